"""Algorithm 1 as it runs: who moves when, what stays frozen, ranks, resuming, and what sampling makes of the student."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import train
from diffusion import sample_generators
from engine import checkpoint, run_folder
from engine.config import Config
from engine.errors import UserError
from engine.folders import part_of
from engine.models import PARTS, load_denoiser, load_sam, load_vae
from engine.pictures import generate
from engine.prompts import PromptEncoder

SMALL = {"iterations": 3, "batch_size": 4, "preview_every": 0, "log_every": 1, "save_every": 1000, "lr_schedule": "constant"}


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student(run):
    return load_file(next(run_folder.newest(run).glob("[ul]*/*.safetensors")))  # unet/, or of a LoRA student lora/


def flags(**settings):
    return [part for k, v in {**SMALL, **settings}.items() for part in ([f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]))]


STARTED = []


@pytest.fixture(autouse=True)
def no_survivors():
    """What a failed test has started must not slow the others."""
    yield
    for p in STARTED:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    STARTED.clear()


def launch(*argv, ranks=1, restarts=0, patience=30):
    """Start train.py as its user does, with torchrun for several ranks. patience: seconds that torchrun leaves to ranks that it ends."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    torchrun += ["--shutdown-timeout", str(patience)]
    program, env = [sys.executable, *(torchrun if ranks > 1 else [])], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(subprocess.Popen([*program, "train.py", *argv], **pipes, env=env, start_new_session=True))
    return STARTED[-1]


def test_learning_rates_fall_to_zero(tmp_path, monkeypatch):
    """In 4 loops G and the score estimator step at 4, 3, 2 and 1 quarters of their rates, D at its whole one."""
    rates, real_update = {"G": [], "fake": [], "D": []}, cast.Cast.update

    def update(self, name, *rest):
        rates[name].append(self.players[name][1].param_groups[0]["lr"])
        return real_update(self, name, *rest)

    monkeypatch.setattr(cast.Cast, "update", update)
    few = {**SMALL, "iterations": 4, "batch_size": 2, "lr_schedule": "linear", "lr": 4e-5, "fake_lr": 8e-5, "d_lr": 1e-4}
    train.train(Config(**few, out=str(tmp_path / "run")))
    assert rates == {"G": pytest.approx([4e-5, 3e-5, 2e-5, 1e-5]), "fake": pytest.approx([8e-5, 6e-5, 4e-5, 2e-5]), "D": [1e-4] * 4}


@pytest.mark.parametrize("ttur", [1, 2, 5])
def test_updates_per_network(ttur, tmp_path, monkeypatch):
    """Algorithm 1, line 12: in 10 loops G moves 10 / TTUR times, the score estimator and D 10 times; Eq. 11 follows each move of G."""
    names, pulls, real_update, real_pull = {1e-5: "G", 2e-5: "fake", 3e-5: "D"}, [], cast.update, train.score_estimator.pull
    moves = dict.fromkeys(names.values(), 0)

    def update(optimizer, loss, *rest):
        module = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in module]
        result = real_update(optimizer, loss, *rest)
        moves[names[optimizer.param_groups[0]["lr"]]] += any(not torch.equal(b, p) for b, p in zip(before, module))
        return result

    monkeypatch.setattr(cast, "update", update)
    monkeypatch.setattr(train.score_estimator, "pull", lambda *a: (pulls.append(1), real_pull(*a)))
    rates = {"lr": 1e-5, "fake_lr": 2e-5, "d_lr": 3e-5}
    run = train.train(Config(**{**SMALL, **rates, "iterations": 10, "batch_size": 2}, ttur=ttur, out=str(tmp_path / "run")))
    assert moves == {"G": 10 // ttur, "fake": 10, "D": 10}
    assert len(pulls) == 10 // ttur
    logged = metrics_of(run)[-1]
    assert (logged["loops"], logged["generator_updates"], logged["samples"]) == (10, 10 // ttur, 20)


FROZEN = [{"adv_reading": "a", "gan_loss": "logistic", "gan_reals": "vae"}, {"dm_steps": "all", "preview_every": 2}, {"gan": "latent"}]


@pytest.mark.parametrize("settings", FROZEN)
def test_frozen_networks_stay_bit_identical(settings, tmp_path, monkeypatch):
    kept = {}
    for name in ("load_denoiser", "load_vae", "load_sam", "load_encoder"):
        real = getattr(cast, name)
        monkeypatch.setattr(cast, name, lambda *a, real=real, name=name: kept.setdefault(name, []).append(real(*a)) or kept[name][-1])
    run = train.train(Config(**{**SMALL, **settings}, out=str(tmp_path / "run")))
    teacher, G, fake = kept["load_denoiser"]
    pairs = [(teacher.net, load_denoiser("toy/sdxl").net), (kept["load_vae"][0], load_vae("toy/sdxl"))]
    pairs += [(sam, load_sam("toy/sam")) for sam in kept.get("load_sam", ())]
    assert ("load_sam" in kept) == ("gan" not in settings)
    pairs += zip(kept["load_encoder"][0].encoders, PromptEncoder("toy/sdxl", 64).encoders)
    for used, fresh in pairs:
        assert all(torch.equal(a, b) for a, b in zip(used.state_dict().values(), fresh.state_dict().values()))
    for moved in (G, fake):
        assert any(not torch.equal(a, b) for a, b in zip(moved.net.parameters(), teacher.net.parameters()))
    saved = student(run)
    assert all(torch.equal(saved[k], v) for k, v in G.net.state_dict().items())
    assert [p.name for p in sorted(run.glob("*.png"))] == (["preview-000002.png", "preview-000003.png"] if "preview_every" in settings else [])


@pytest.mark.parametrize("settings", [{}, {"gan_weight": 0, "dm_steps": "all"}])
def test_micro_batches_add_up(settings, tmp_path):
    """Four samples at once, or two by two: the same losses, norms and health signals; and a micro-batch that does not divide is refused."""
    few = {**SMALL, **settings, "iterations": 1}
    ((one,), (two,)) = (metrics_of(train.train(Config(**few, micro_batch=n, out=str(tmp_path / str(n))))) for n in (0, 2))
    for key in one.keys() - {"seconds", "latent_std_ratio", "score_lag"}:  # of parts, these differ
        # Through a steep sample rounding reaches 0.5 % of the gradient in fp32 (1e-12 in fp64).
        assert two[key] == pytest.approx(one[key], rel=0.05 if key.endswith("norm") else 1e-3, abs=1e-5), key
    with pytest.raises(train.UserError, match="--micro-batch 3"):
        train.train(Config(**few, micro_batch=3, out=str(tmp_path / "3")))


def test_gan_crop_shows_D_the_same_square_of_both(tmp_path):
    """The square's pixels are those of its latents; it moves from loop to loop; a run with it is finite; a bad size is refused."""
    config, vae, corners = Config(gan_crop=32), load_vae("toy/sdxl"), set()
    latents = torch.randn(2, 4, 16, 16)
    images = torch.nn.functional.interpolate(latents, scale_factor=vae.factor)
    for loop in range(20):
        z, pixels = train.window(config, vae, 16, loop)
        assert images[pixels].shape[2:] == (32, 32)
        assert torch.equal(images[pixels], torch.nn.functional.interpolate(latents[z], scale_factor=vae.factor))
        corners.add((pixels[1].start, pixels[2].start))
    assert len(corners) > 10 and all(0 <= a <= 32 and a % 4 == 0 for corner in corners for a in corner)
    assert images[train.window(Config(), vae, 16, 1)[1]].shape == images.shape
    (last,) = metrics_of(train.train(Config(**SMALL | {"iterations": 1}, gan_crop=32, out=str(tmp_path / "run"))))
    assert math.isfinite(last["adv_loss"]) and math.isfinite(last["d_loss"])
    for size in (30, 128):
        with pytest.raises(UserError, match="--gan-crop"):
            train.train(Config(**SMALL, gan_crop=size, out=str(tmp_path / "bad")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling three UNets for the CPU takes five minutes")
def test_compiled_steps_are_the_same(tmp_path):
    plain, compiled = (train.train(Config(**SMALL | {"gan_weight": 0}, compile=on, out=str(tmp_path / str(on)))) for on in (False, True))
    for a, b in zip(metrics_of(plain), metrics_of(compiled)):
        assert b["dm_loss"] == pytest.approx(a["dm_loss"], rel=1e-3) and b["fake_loss"] == pytest.approx(a["fake_loss"], rel=1e-3)


def test_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, recomputed = (train.train(Config(**SMALL, checkpointing=on, out=str(tmp_path / str(on)))) for on in (False, True))
    for a, b in zip(student(plain).values(), student(recomputed).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noisy, last", [([999, 749, 499], 249), ([999, 874, 749, 624, 499, 374, 249], 124)])
def test_losses_reach_their_own_steps(noisy, last, tmp_path, monkeypatch):
    """The DM loss sees only the steps 999, 749, 499 of G, or the first seven of eight; the adversarial loss only the last one (timestep-aware, 3.3).

    Eq. 8's Detach: no input of G carries a graph. Eq. 10's loss leaves no gradient in G or the score estimator.
    """
    with_gradient, real, real_D = [], cast.load_denoiser, train.average_gradients

    def load(*args):
        denoiser = real(*args)
        call = type(denoiser).__call__

        class Watched(type(denoiser)):
            def __call__(self, x_t, t, c):
                assert not x_t.requires_grad
                if torch.is_grad_enabled():
                    with_gradient.append((id(self), t.unique().tolist()))
                return call(self, x_t, t, c)

        denoiser.__class__ = Watched
        loaded.append(denoiser)
        return denoiser

    loaded = []

    def after_D(module, ranks):
        assert all(p.grad is not None for p in module.parameters())
        assert all(p.grad is None for d in loaded for p in d.net.parameters())
        real_D(module, ranks)

    monkeypatch.setattr(cast, "load_denoiser", load)
    monkeypatch.setattr(train, "average_gradients", after_D)
    settings = {**SMALL, "iterations": 4 * len(noisy), "batch_size": 2, "student_steps": len(noisy) + 1}
    train.train(Config(**settings, out=str(tmp_path / "run")))
    steps = [t[0] for who, t in with_gradient if who == id(loaded[1])]
    assert set(steps[0::2]) == set(noisy) and set(steps[1::2]) == {last}
    assert not [who for who, _ in with_gradient if who == id(loaded[0])]  # the teacher never


def test_non_finite_update_is_skipped_and_ten_end_the_run(tmp_path, monkeypatch):
    real, calls = train.score_estimator.loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * float("nan")

    monkeypatch.setattr(train.score_estimator, "loss", loss)
    run = tmp_path / "run"
    with pytest.raises(train.UserError, match="10 loops in a row"):
        train.train(Config(**{**SMALL, "iterations": 50, "batch_size": 2, "log_every": 100}, out=str(run), gan_weight=0, ema=1))
    progress = json.loads((run_folder.newest(run) / "progress.json").read_text())
    assert len(calls) == 10 and progress["skipped_updates"] == 10 and progress["generator_updates"] == 10
    assert all(torch.isfinite(v).all() for v in student(run).values())


DMD2 = {"gan": "latent", "dm_steps": "all", "iterations": 2}
SD3_LORA = {"model": "toy/sd3", "lora_rank": 4, "iterations": 2}


def smooth(model, path):
    """A copy of a toy with a denoiser of random weights: the trained ones amplify rounding, for single pictures 10,000-fold in their gradients."""
    torch.manual_seed(0)
    part = part_of(model)
    shutil.copytree(model, path)
    PARTS[part].from_config(PARTS[part].load_config(path / part)).save_pretrained(path / part)
    return path


@pytest.mark.parametrize("method", [{}, DMD2, DMD2 | {"lora_rank": 4}, SD3_LORA])
@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_one(method, tmp_path):
    """2 gloo ranks x 8, sharded by FSDP2, take the same 5 steps (the baseline: 2) as 1 rank x 16: losses, gradient norms, how far the weights moved.

    Small learning rates: AdamW turns the rounding noise of gradients near zero into whole steps, which at the default rates
    moves losses by 1e-4 within three loops. adv_loss is a mean of logits of order 1 that crosses zero, hence its absolute bound.
    """
    model = smooth(method.get("model", "toy/sdxl"), tmp_path / "model")
    settings = {"iterations": 5, "batch_size": 16, "ema": 0.99, "lr": 2e-6, "fake_lr": 1e-5, "d_lr": 1e-5, **method, "model": model}
    processes = [launch(*flags(**settings, out=tmp_path / f"r{n}"), ranks=n) for n in (1, 2)]
    for p in processes:
        out, _ = p.communicate(timeout=400)
        assert p.returncode == 0, out[-3000:]
    one, two = metrics_of(tmp_path / "r1"), metrics_of(tmp_path / "r2")
    assert len(one) == len(two) == settings["iterations"]
    for a, b in zip(one, two):
        for key in ("dm_loss", "adv_loss", "fake_loss", "d_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=5e-5 if key == "adv_loss" else 2e-6), (a["loops"], key)
        for key in ("g_norm", "fake_norm"):  # a sum over ranks where a mean belongs would double these, and AdamW would hide it
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["loops"], key)
    start, ends = load_denoiser(model).net.state_dict(), [student(tmp_path / f"r{n}") for n in (1, 2)]
    start |= {k: torch.zeros_like(v) for k, v in ends[0].items() if "lora_B" in k}
    moved = [torch.cat([(v - start[k]).flatten() for k, v in end.items() if "lora_A" not in k]) for end in ends]
    assert moved[0].norm() > 0 and (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_one_in_stage_2(tmp_path):
    """The same for two preference updates and one distillation update, with reference and reward model sharded too."""
    stage_1 = train.train(Config(**SMALL | {"iterations": 1, "gan_weight": 0}, out=str(tmp_path / "one")))
    settings = {"stage": 2, "init": stage_1, "rl_ratio": 2, "batch_size": 8, "gan_weight": 0, "lr": 2e-6, "fake_lr": 1e-5, "rl_lr": 1e-6}
    processes = [launch(*flags(**settings, out=tmp_path / f"r{n}"), ranks=n) for n in (1, 2)]
    for p in processes:
        out, _ = p.communicate(timeout=400)
        assert p.returncode == 0, out[-3000:]
    one, two = metrics_of(tmp_path / "r1"), metrics_of(tmp_path / "r2")
    assert ["rl_loss" in m for m in one] == [True, True, False]
    for a, b in zip(one, two, strict=True):
        for key in {"rl_loss", "reward", "kept_pairs", "implicit_accuracy", "dm_loss", "fake_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-6), (a["loops"], key)
        for key in {"rl_norm", "g_norm", "fake_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3 if a["loops"] == 1 else 0.05), (a["loops"], key)


@pytest.mark.xdist_group("ranks")
def test_resumes_on_another_number_of_ranks(tmp_path):
    """Four loops on one rank; two on two and then two on one; two on one and then two on two: one run."""
    common = {"model": smooth("toy/sdxl", tmp_path / "model"), "batch_size": 4, "lr": 2e-6, "fake_lr": 1e-5, "d_lr": 1e-5, "ema": 0.99}
    one = metrics_of(train.train(Config(**{**SMALL, **common, "model": str(common["model"]), "iterations": 4}, out=str(tmp_path / "one"))))
    for first, then in ((2, 1), (1, 2)):
        out = tmp_path / f"{first} {then}"
        for loops, ranks in ((2, first), (4, then)):
            p = launch(*flags(**common, iterations=loops, out=out, resume=True), ranks=ranks)
            printed, _ = p.communicate(timeout=200)
            assert p.returncode == 0, printed[-3000:]
        other = metrics_of(out)
        assert [m["loops"] for m in other] == [1, 2, 3, 4]
        for a, b in zip(one, other):
            for key in ("dm_loss", "fake_loss", "d_loss", "g_norm", "fake_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-3), (a["loops"], key)


def test_eq_11_on_shards(two_ranks):
    """psi <- lam psi + (1 - lam) theta on FSDP2 shards of 2 ranks, after a forward pass, against the same on whole weights."""
    two_ranks(PULL_ON_SHARDS)


PULL_ON_SHARDS = """
import torch, torch.distributed as dist
from engine import distributed
import score_estimator
from engine.distributed import shard
from engine.models import load_denoiser

dist.init_process_group("gloo")
nets = []
for scale in (1.0, 1.5):
    net = load_denoiser("toy/sdxl").net
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    nets.append(net)
psi, theta = nets
whole = [0.9 * p.detach() + 0.1 * q.detach() for p, q in zip(psi.parameters(), theta.parameters())]
for net in nets:
    shard(net, torch.float32)
c = {"encoder_hidden_states": torch.zeros(1, 32, 256), "added_cond_kwargs": {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)}}
with torch.no_grad():
    psi(torch.zeros(1, 4, 16, 16), torch.tensor([5]), **c)
score_estimator.pull(psi.parameters(), theta.parameters(), 0.9)
assert all(p.to_local().numel() < p.numel() for p in psi.parameters() if p.shape[0] % 2 == 0)
for p, w in zip(psi.parameters(), whole):
    torch.testing.assert_close(p.full_tensor(), w)
distributed.leave()
"""


def test_8_bit_moments_on_shards(two_ranks):
    """torchao's AdamW on FSDP2 shards of 2 ranks: saved and restored, it goes on as if never stopped; beside AdamW's way it errs by a tenth."""
    pytest.importorskip("torchao")
    two_ranks(MOMENTS_ON_SHARDS, TORCHDYNAMO_DISABLE="1")  # torchao compiles its step: minutes for the toy


MOMENTS_ON_SHARDS = """
import sys, torch, torch.distributed as dist
from engine import checkpoint
from engine import config
from engine import distributed
from engine.distributed import adamw, shard, update, weights
from engine.models import load_denoiser

dist.init_process_group("gloo")

def fresh(kind):
    net = shard(load_denoiser("toy/sdxl").net, torch.float32)
    return net, adamw(list(net.parameters()), 1e-3, config.Config(optimizer=kind))

def step(player, n):
    for p in player[0].parameters():
        p.grad = p.detach() + 0.1 * (n + 1)
    update(player[1], torch.zeros(()))

eight, plain = fresh("adamw8bit"), fresh("adamw")
start = [p.full_tensor().clone() for p in weights(plain[1])]
for n in range(3):
    step(eight, n), step(plain, n)
state = eight[1].state[max(weights(eight[1]), key=lambda p: p.numel())]["exp_avg"]
assert "8bit" in type(getattr(state, "_local_tensor", state)).__name__
checkpoint.save(sys.argv[1], {"G": eight}, {"loops": 3})
again = fresh("adamw8bit")
checkpoint.restore(sys.argv[1], {"G": again})
for player in (eight, again, plain):
    step(player, 3)
for p, q, r, p_0 in zip(*(weights(player[1]) for player in (eight, again, plain)), start):
    p, q, r = (v.full_tensor() for v in (p, q, r))
    assert torch.equal(p, q) and (p - r).norm() < 0.1 * (r - p_0).norm()
distributed.leave()
"""


def test_checkpoint_in_the_background(two_ranks):
    """2 ranks go on training while a checkpoint is written: what it holds are the weights and moments of the moment it was asked for."""
    two_ranks(IN_THE_BACKGROUND)


IN_THE_BACKGROUND = """
import sys, torch, torch.distributed as dist
from engine import checkpoint
from engine import distributed
from engine import run_folder
from engine.distributed import shard, update
from engine.models import load_denoiser

dist.init_process_group("gloo")
net = shard(load_denoiser("toy/sdxl").net, torch.float32)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

def step(gradient):
    for p in net.parameters():
        p.grad = torch.full_like(p, gradient)
    update(optimizer, torch.zeros(()))

step(1.0)
asked_for = [p.full_tensor().clone() for p in net.parameters()]
checkpoint.save(sys.argv[1], {"G": (net, optimizer)}, {"loops": 1}, background=True)
for _ in range(3):
    step(-1.0)
checkpoint.save(sys.argv[1], {"G": (net, optimizer)}, {"loops": 4}, keep=2, background=True)
checkpoint.settle()
dist.barrier()
assert [p.name for p in run_folder.checkpoints(sys.argv[1])] == ["checkpoint-000001", "checkpoint-000004"]
assert checkpoint.load(run_folder.checkpoints(sys.argv[1])[0], {"G": (net, optimizer)}) == {"loops": 1}
assert all(torch.equal(p.full_tensor(), q) for p, q in zip(net.parameters(), asked_for))
moments = [optimizer.state[p]["exp_avg"] for p in net.parameters()]
assert all(torch.allclose(m.full_tensor(), torch.full(m.shape, 0.1)) for m in moments)  # (1 - beta_1) times the first gradient
distributed.leave()
"""


def test_resume_after_kill(tmp_path):
    """kill -9 in the middle, then --resume: the same weights as a run that was left alone."""
    settings = {"iterations": 8, "save_every": 3}
    whole = launch(*flags(**settings, out=tmp_path / "whole"))
    broken = launch(*flags(**{**settings, "iterations": 500}, out=tmp_path / "broken"))
    wait_for(tmp_path / "broken" / "checkpoint-000003")
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert whole.communicate(timeout=300) and whole.returncode == 0
    resumed = launch(*flags(**settings, out=tmp_path / "broken", resume=True))
    out, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, out[-3000:]
    a, b = student(tmp_path / "whole"), student(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [m["loops"] for m in metrics_of(tmp_path / "broken")] == list(range(1, 9))


def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    """The newest checkpoint's weights cut to half: a warning, the one before resumed, and in the end the same weights as an unbroken run."""
    settings = SMALL | {"gan_weight": 0, "iterations": 6, "save_every": 2}
    whole = train.train(Config(**settings, out=str(tmp_path / "whole")))
    assert [p.name[-1] for p in run_folder.checkpoints(whole)] == ["4", "6"]  # --keep 2
    torn = train.train(Config(**settings, out=str(tmp_path / "torn")))
    for part in (run_folder.newest(torn) / "state").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    train.train(Config(**settings, out=str(torn), resume=True))
    assert "checkpoint-000006" in capsys.readouterr().err and (torn / "checkpoint-000006.unreadable").is_dir()
    a, b = student(whole), student(torn)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for path in run_folder.checkpoints(torn):
        (path / "state" / ".metadata").unlink()
    with pytest.raises(UserError, match="and no other checkpoint"):
        train.train(Config(**settings, out=str(torn), resume=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends(ranks, tmp_path):
    """SIGTERM, to loader processes too: saved at the loop in hand, exit 0 (torchrun's own is 1). --resume without the folder starts afresh."""
    settings = {"gan_weight": 0, "iterations": 500, "save_every": 1000, "resume": True, "workers": 1}
    ended = launch(*flags(**settings, out=tmp_path / "ended"), ranks=ranks, patience=150)
    wait_for(tmp_path / "ended" / "metrics.jsonl", content=True)
    ended.send_signal(signal.SIGTERM)
    out, _ = ended.communicate(timeout=200)
    saved = json.loads((run_folder.newest(tmp_path / "ended") / "progress.json").read_text())
    assert ended.returncode == ranks - 1 and 0 < saved["loops"] < 500, out[-3000:]


def test_sigterm_while_ranks_ask(two_ranks):
    """Heard by one rank while it waits for the other: both give the same answer, and yes the next time."""
    two_ranks(ASK)


ASK = """
import os
import signal
import threading
import time
import torch.distributed as dist
from engine import distributed

rank, ranks, device = distributed.start_process()
ending = distributed.Ending(device)
dist.barrier()
if rank == 0:
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
else:
    time.sleep(2)
answers = [None, None]
dist.all_gather_object(answers, [ending.asked(), ending.asked()])
assert answers == [[False, True]] * 2, answers
distributed.leave()
"""


@pytest.mark.xdist_group("ranks")
def test_a_dead_rank_ends_the_others(tmp_path):
    """Within 60 s of its death, and torchrun says which it was and how it ended."""
    broken = launch(*flags(gan_weight=0, iterations=500, out=tmp_path / "broken"), ranks=2)
    wait_for(tmp_path / "broken" / "metrics.jsonl", content=True)
    kill_a_rank(broken)
    out, _ = broken.communicate(timeout=60)
    assert broken.returncode == 1 and re.search(r"exitcode *: -9", out), out[-3000:]


def kill_a_rank(torchrun):
    os.kill(int(Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()[0]), signal.SIGKILL)


@pytest.mark.xdist_group("ranks")
def test_a_killed_rank_restarts_the_run(tmp_path):
    """kill -9 on one of two ranks: torchrun ends the other, starts both again, and they go on by themselves, to an unbroken run's weights."""
    settings = {"gan_weight": 0, "iterations": 16, "save_every": 4}
    whole = launch(*flags(**settings, out=tmp_path / "whole"), ranks=2)
    assert whole.communicate(timeout=300) and whole.returncode == 0
    broken = launch(*flags(**settings, out=tmp_path / "broken"), ranks=2, restarts=1)
    wait_for(tmp_path / "broken" / "checkpoint-000004")
    kill_a_rank(broken)
    out, _ = broken.communicate(timeout=240)
    assert broken.returncode == 0 and "exitcode: -9" in out, out[-3000:]
    a, b = student(tmp_path / "whole"), student(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)


def wait_for(path, content=False):
    deadline = time.time() + 200
    while not (path.exists() and (not content or path.read_text())):
        assert time.time() < deadline, f"{path} does not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, with a learning rate that moves the student visibly."""
    return train.train(Config(**SMALL, lr=3e-4, gan_weight=0, out=str(tmp_path_factory.mktemp("runs") / "short")))


def test_plain_diffusers_draws_the_same_picture(trained):
    """The student in StableDiffusionXLPipeline with LCMScheduler, guidance 0 and the same per-image generator."""
    prompts = ["a red circle", "a large blue ring at the top left"]
    unet = UNet2DConditionModel.from_pretrained(run_folder.newest(trained) / "unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained("toy/sdxl", unet=unet, torch_dtype=torch.float32)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    pipeline.set_progress_bar_config(disable=True)
    generators = sample_generators(3, 0, range(2), "sample")
    theirs = pipeline(prompts, num_inference_steps=4, guidance_scale=0.0, generator=generators, height=64, width=64, output_type="pt").images
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    ours = generate(G, PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), prompts, 4, 3)
    assert ((ours.clamp(-1, 1) + 1) / 2 - theirs).abs().max() < 2 / 255


def test_export_is_a_pipeline_of_its_own(trained, tmp_path):
    """Loaded by plain diffusers with nothing but its folder, the card's two settings and the generator, it draws our picture."""
    out = checkpoint.export(str(trained), tmp_path / "student")
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generators = sample_generators(3, 0, range(1), "sample")
    theirs = pipeline(["a red circle"], num_inference_steps=4, guidance_scale=0, generator=generators, height=64, width=64, output_type="pt").images
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    ours = generate(G, PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), ["a red circle"], 4, 3)
    assert ((ours + 1) / 2 - theirs).abs().max() < 2 / 255
    card = (out / "README.md").read_text()
    assert "999, 749, 499, 249" in card and "guidance_scale=0" in card and "{" not in card.split("## Settings")[0].split("```python")[0]
    with pytest.raises(UserError, match="not empty"):
        checkpoint.export(str(trained), out)


def test_picture_does_not_depend_on_the_batch(trained):
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    encoder, vae, prompts = PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), ["a red circle", "a blue ring", "a green cross"]
    whole = generate(G, encoder, vae, prompts, 4, 0, batch=3)
    for batch in (1, 2):
        assert (generate(G, encoder, vae, prompts, 4, 0, batch=batch) - whole).abs().max() < 2 / 255
    assert torch.allclose(generate(G, encoder, vae, prompts[2:], 4, 0, first=2)[0], whole[2], atol=2 / 255)
