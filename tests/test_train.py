"""Algorithm 1 as it runs: which network moves when, what stays frozen, ranks, resuming, and what sampling gives."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dmd
import pixel_gan
import train
from diffusion import sample_generators
from engine import export, run_folder
from engine.batch import Batch
from engine.config import Config
from engine.errors import UserError
from engine.models import load_denoiser, load_sam, load_vae
from engine.networks import Networks, assemble
from engine.pictures import generate
from engine.prompts import PromptEncoder
from toy import world

SMALL = {"iterations": 3, "batch_size": 2, "preview_every": 0, "log_every": 1, "save_every": 1000}
SMALL["lr_schedule"] = "constant"


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student(run):
    return load_file(next(run_folder.newest(run).glob("[ult]*/*.safetensors")))  # unet/, transformer/, or lora/


def flags(**settings):
    """Settings as a command line, with those of SMALL; a switch has the value True."""
    argv = []
    for name, value in {**SMALL, **settings}.items():
        argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv


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
    """Start train.py as its user does, with torchrun for several ranks. patience: seconds that ranks have to end."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(restarts),
    ]
    torchrun += ["--shutdown-timeout", str(patience)]
    program, env = [sys.executable, *(torchrun if ranks > 1 else [])], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(subprocess.Popen([*program, "train.py", *argv], **pipes, env=env, start_new_session=True))
    return STARTED[-1]


class Watched(Networks):
    """Networks that keep of each step: who, whether its weights moved, who else had a gradient, whether fake was G."""

    def step(self, name, *rest):
        module = self.players[name][0]
        before = [p.detach().clone() for p in self.weights(name)]
        others = {other for other, (net, _) in self.players.items() if net is not module}
        waiting = {other for other in others if any(p.grad is not None for p in self.weights(other))}
        alike = all(map(torch.equal, self.weights("fake"), self.weights("G")))
        result = super().step(name, *rest)
        moved = any(not torch.equal(b, p) for b, p in zip(before, self.weights(name)))
        self.told.append((name, moved, waiting, alike))
        return result


def watched(*flags, batch_size=2):
    """-> networks of a command line that keep their steps, its method's iterate, a function that makes a batch."""
    config = train.read([*flags, "--batch-size", str(batch_size), "--lr-schedule", "constant"])
    prepare, iterate = train.method(config)
    made = assemble(config, 1, torch.device("cpu"), prepare)
    nets = Watched(**{f.name: getattr(made, f.name) for f in fields(Networks)})
    nets.told = []
    pairs = [world.scene(i) for i in range(batch_size)]
    pictures = torch.stack([world.render(scene) for scene, _ in pairs])
    prompts = [caption for _, caption in pairs]
    c = nets.encoder.encode(prompts)
    return nets, iterate, lambda loop: Batch(pictures, prompts, c, list(range(batch_size)), loop)


@pytest.mark.parametrize("warmup", [0, 2])
def test_learning_rates_fall_to_zero(warmup):
    """In 4 loops G and the score estimator step at 4, 3, 2 and 1 quarters of their rates, D at its whole one.

    With --warmup 2 all of them have half of that in the first loop.
    """
    nets, *_ = watched("--iterations", "4", "--lr", "4e-5", "--fake-lr", "8e-5", "--d-lr", "1e-4")
    nets.config.lr_schedule = "linear"
    nets.config.warmup = warmup
    first = 0.5 if warmup else 1
    rates = {"G": [], "fake": [], "D": []}
    for loop in range(1, 5):
        nets.pace(loop)
        for name, seen in rates.items():
            seen.append(nets.players[name][1].param_groups[0]["lr"])
    assert rates["G"] == pytest.approx([first * 4e-5, 3e-5, 2e-5, 1e-5])
    assert rates["fake"] == pytest.approx([first * 8e-5, 6e-5, 4e-5, 2e-5])
    assert rates["D"] == [first * 1e-4, 1e-4, 1e-4, 1e-4]


@pytest.mark.parametrize("ttur", [1, 2, 5])
def test_updates_per_network(ttur):
    """Algorithm 1, line 12: in 5 loops G moves 5 // TTUR times, the score estimator and D 5 times, in this order.

    Eq. 11 follows each move of G: at λ = 0 the score estimator starts its own step from G's weights.
    """
    nets, iterate, batch = watched("--ttur", str(ttur), "--ema", "0", batch_size=1)
    for n in range(1, 6):
        nets.told.clear()
        iterate(nets, batch(n), n)
        moves_G = n % ttur == 0
        assert [name for name, *_ in nets.told] == (["G"] if moves_G else []) + ["fake", "D"]
        assert all(moved for _, moved, *_ in nets.told)
        (alike,) = (alike for name, *_, alike in nets.told if name == "fake")
        assert alike == (moves_G or n == 1)  # at the start both are the teacher
    assert nets.steps == {("G", True): 5 // ttur, ("fake", True): 5, ("D", True): 5}


FROZEN = {
    "pixel": ["--adv-reading", "a", "--gan-loss", "logistic", "--gan-reals", "vae"],
    "dm all": ["--dm-steps", "all", "--gan-crop", "32"],
    "dmd2": ["--method", "dmd2", "--ttur", "1"],
}


@pytest.mark.parametrize("flags", FROZEN.values(), ids=FROZEN)
def test_frozen_networks_stay_bit_identical(flags):
    """Two loops move G and the score estimator, and nothing of teacher, VAE, SAM and text encoders."""
    nets, iterate, batch = watched(*flags)
    for n in (1, 2):
        iterate(nets, replace(batch(n), watched=True), n)
    pairs = [(nets.teacher.net, load_denoiser("toy/sdxl").net), (nets.vae, load_vae("toy/sdxl"))]
    pairs += zip(nets.encoder.encoders, PromptEncoder("toy/sdxl", 64).encoders)
    if nets.config.method == "flash":
        pairs.append((nets.D.encoder[0], load_sam("toy/sam")))
    for used, fresh in pairs:
        assert all(map(torch.equal, used.state_dict().values(), fresh.state_dict().values()))
    for moved in (nets.G, nets.fake):
        assert any(not torch.equal(a, b) for a, b in zip(moved.net.parameters(), nets.teacher.net.parameters()))


def test_a_run_saves_its_student_and_draws_previews(small_toys, tmp_path):
    """The newest checkpoint's unet/ is G of its state/; previews and --watch at every second loop, at the end."""
    (tmp_path / "watch.txt").write_text("a red circle\n")
    settings = SMALL | {"preview_every": 2, "gan_weight": 0, "batch_size": 1, "model": small_toys["sdxl"]}
    settings["watch"] = str(tmp_path / "watch.txt")
    run = train.train(Config(**settings, out=str(tmp_path / "run")))
    assert [p.name for p in sorted(run.glob("*.png"))] == ["preview-000002.png", "preview-000003.png"]
    assert [line["loops"] for line in metrics_of(run) if line.get("watch_diversity", 0) > 0] == [2, 3]
    dcp_to_torch_save(run_folder.newest(run) / "state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["G"]["model"]
    saved = student(run)
    assert saved.keys() == state.keys() and all(torch.equal(saved[k], v) for k, v in state.items())


@pytest.mark.parametrize("settings", [{}, {"gan_weight": 0, "dm_steps": "all"}])
def test_micro_batches_add_up(settings, tmp_path):
    """Four samples at once, or two by two: the same losses, norms and health signals. Another size is refused."""
    few = {**SMALL, **settings, "iterations": 1, "batch_size": 4}
    ((one,), (two,)) = (
        metrics_of(train.train(Config(**few, micro_batch=n, out=str(tmp_path / str(n))))) for n in (0, 2)
    )
    for key in one.keys() - {"seconds", "latent_std_ratio", "score_lag"}:  # of parts, these differ
        # Through a steep sample rounding reaches 0.5 % of the gradient in fp32 (1e-12 in fp64).
        assert two[key] == pytest.approx(one[key], rel=0.05 if key.endswith("norm") else 1e-3, abs=1e-5), key
    with pytest.raises(UserError, match="--micro-batch 3"):
        train.train(Config(**few, micro_batch=3, out=str(tmp_path / "3")))


def test_gan_crop_shows_D_the_same_square_of_both(tmp_path):
    """The square's pixels are those of its latents; it moves from loop to loop; a bad size is refused."""
    factor = load_vae("toy/sdxl").factor
    latents = torch.randn(2, 4, 16, 16)
    images = torch.nn.functional.interpolate(latents, scale_factor=factor)
    corners = set()
    for loop in range(20):
        z, pixels = pixel_gan.window(32, latents, factor, 0, loop)
        assert images[pixels].shape[2:] == (32, 32)
        assert torch.equal(images[pixels], torch.nn.functional.interpolate(latents[z], scale_factor=factor))
        corners.add((pixels[1].start, pixels[2].start))
    assert len(corners) > 10 and all(0 <= a <= 32 and a % 4 == 0 for corner in corners for a in corner)
    assert images[pixel_gan.window(0, latents, factor, 0, 1)[1]].shape == images.shape
    for size in (30, 128):
        with pytest.raises(UserError, match="--gan-crop"):
            train.train(Config(**SMALL, gan_crop=size, out=str(tmp_path / "bad")))


def test_checkpointing_changes_nothing_but_memory(small_toys, tmp_path):
    settings = SMALL | {"iterations": 2, "model": small_toys["sdxl"]}
    plain, recomputed = (
        train.train(Config(**settings, checkpointing=on, out=str(tmp_path / str(on)))) for on in (False, True)
    )
    for a, b in zip(student(plain).values(), student(recomputed).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class Seen:
    """A Denoiser that keeps the timesteps of its calls with gradient; no input of it may carry a graph (Eq. 8)."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.net, self.steps = denoiser, denoiser.schedule, denoiser.net, []

    def __call__(self, x_t, t, c):
        assert not x_t.requires_grad
        if torch.is_grad_enabled():
            self.steps.append(t.unique().tolist())
        return self.denoiser(x_t, t, c)


STEPS_OF_DM = [
    ([999, 749, 499], 249),
    ([999, 874, 749, 624, 499, 374, 249], 124),
    ([998, 665], 332),
    ([999], 499),
    ([999], 999),
]


@pytest.mark.parametrize("noisy, last", STEPS_OF_DM)
def test_losses_reach_their_own_steps(noisy, last):
    """The DM loss trains G at the steps 999, 749, 499 alone, all but the last of any number; Eq. 9 at the last (3.3).

    A single step has both. No optimizer steps while another network has a gradient: each loss reaches its own network
    and no other.
    """
    nets, iterate, batch = watched("--student-steps", str(len({*noisy, last})), batch_size=1)
    nets.G, nets.fake = Seen(nets.G), Seen(nets.fake)
    loops = {dmd.student_step(nets.S, "high", 0, loop): loop for loop in range(1, 60)}
    for loop in loops.values():
        iterate(nets, batch(loop), 1)
    steps = [t for (t,) in nets.G.steps]
    assert sorted(steps[0::2]) == sorted(noisy) and set(steps[1::2]) == {last}
    assert len(nets.fake.steps) == len(noisy)  # Eq. 6 alone
    assert not any(waiting for _, _, waiting, _ in nets.told)


def test_non_finite_update_is_skipped_and_ten_end_the_run(small_toys, tmp_path, monkeypatch):
    """Eq. 6's loss is not a number: the score estimator stays, G goes on, the tenth such loop saves and ends."""
    real = train.score_estimator.loss
    monkeypatch.setattr(train.score_estimator, "loss", lambda *args: real(*args) * float("nan"))
    run = tmp_path / "run"
    settings = SMALL | {"iterations": 50, "batch_size": 1, "log_every": 100, "gan_weight": 0, "ema": 1}
    settings["model"] = small_toys["sdxl"]
    with pytest.raises(UserError, match="10 loops in a row"):
        train.train(Config(**settings, out=str(run)))
    progress = json.loads((run_folder.newest(run) / "progress.json").read_text())
    assert progress["loops"] == progress["skipped_updates"] == progress["generator_updates"] == 10
    assert all(torch.isfinite(v).all() for v in student(run).values())


DMD2 = {"method": "dmd2", "ttur": 1, "iterations": 2}
SD3_LORA = {"model": "sd3", "lora_rank": 4, "iterations": 2}
DMDR = {"method": "dmdr", "ttur": 1, "dynamic": 1, "ema": 1, "iterations": 2}
GRPO = DMDR | {"rl": "grpo", "reward_weight": 1}
ADVDMD = {"method": "advdmd", "ttur": 1, "rl_after": 1, "rl_gate": 0, "iterations": 2}
TOKENS = {"model": "sd3", "checkpointing": True}  # D reads a transformer's block, which is computed again

METHODS = [{}, DMD2, SD3_LORA, DMDR, GRPO, DMD2 | TOKENS | {"lora_rank": 4}, ADVDMD | TOKENS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_one(method, small_toys, two_ranks, tmp_path):
    """2 gloo ranks, sharded by FSDP2, take the same steps as 1 with twice the batch: losses, norms, weights.

    Small learning rates: AdamW turns the rounding noise of gradients near zero into whole steps, which at the default
    rates moves losses by 1e-4 within three loops. adv_loss is a mean of logits of order 1 that crosses zero.
    """
    model = small_toys[method.get("model", "sdxl")]
    rates = {"ema": 0.99, "lr": 2e-6, "fake_lr": 1e-5, "d_lr": 1e-5}
    grouped = method is GRPO or method.get("method") == "advdmd"
    size = 8 if grouped else 4  # whole groups on each rank
    settings = {"iterations": 2, "batch_size": size, **rates, **method, "model": model, "reward": "toy/lrm"}
    one, two = on_one_and_two_ranks(settings, two_ranks, tmp_path)
    assert len(one) == len(two) == settings["iterations"]
    losses = {"dm_loss", "adv_loss", "fake_loss", "d_loss", "reward", "rl_loss"}
    assert "dm_loss" in one[0] and "fake_loss" in one[0]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in losses & a.keys():
            bound = 5e-5 if key in ("adv_loss", "reward", "rl_loss") else 2e-6
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=bound), (a["loops"], key)
        for key in ("g_norm", "fake_norm"):  # a sum over ranks in place of a mean would double these: AdamW hides it
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["loops"], key)
    start, ends = load_denoiser(model).net.state_dict(), [student(tmp_path / f"r{n}") for n in (1, 2)]
    start |= {k: torch.zeros_like(v) for k, v in ends[0].items() if "lora_B" in k}
    moved = [torch.cat([(v - start[k]).flatten() for k, v in end.items() if "lora_A" not in k]) for end in ends]
    assert moved[0].norm() > 0 and (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def on_one_and_two_ranks(settings, two_ranks, folder):
    """The metrics of a run on one rank, in this process, and of the same on two."""
    train_on_two(two_ranks, **settings, out=folder / "r2")
    train.train(train.read(flags(**settings, out=folder / "r1")))
    return metrics_of(folder / "r1"), metrics_of(folder / "r2")


def train_on_two(two_ranks, **settings):
    two_ranks(f"import train; train.train(train.read({flags(**settings)!r}))")


@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_one_in_stage_2(small_toys, two_ranks, tmp_path):
    """Two preference updates and one distillation update, with reference and reward model sharded too."""
    few = SMALL | {"iterations": 1, "batch_size": 2, "gan_weight": 0, "model": small_toys["sdxl"]}
    stage_1 = train.train(Config(**few, out=str(tmp_path / "one")))
    rates = {"lr": 2e-6, "fake_lr": 1e-5, "rl_lr": 1e-6}
    settings = {"stage": 2, "init": stage_1, "rl_ratio": 2, **few, "iterations": 3, "batch_size": 4, **rates}
    one, two = on_one_and_two_ranks(settings, two_ranks, tmp_path)
    assert ["rl_loss" in m for m in one] == [True, True, False]
    for a, b in zip(one, two, strict=True):
        for key in {"rl_loss", "reward", "kept_pairs", "dm_loss", "fake_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-6), (a["loops"], key)
        for key in {"rl_norm", "g_norm", "fake_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3 if a["loops"] == 1 else 0.05), (a["loops"], key)


@pytest.mark.xdist_group("ranks")
def test_resumes_on_another_number_of_ranks(small_toys, two_ranks, tmp_path):
    """Two loops on one rank; one on two ranks and then one on one; one on one and then one on two: one run."""
    common = {"model": small_toys["sdxl"], "batch_size": 4, "ema": 0.99}
    common |= {"lr": 2e-6, "fake_lr": 1e-5, "d_lr": 1e-5}
    one = metrics_of(train.train(Config(**SMALL | common | {"iterations": 2}, out=str(tmp_path / "one"))))
    for ranks in (2, 1):
        out = tmp_path / f"{ranks} first"
        for loops, n in ((1, ranks), (2, 3 - ranks)):
            settings = common | {"iterations": loops, "out": out, "resume": True}
            if n == 2:
                train_on_two(two_ranks, **settings)
            else:
                train.train(train.read(flags(**settings)))
        other = metrics_of(out)
        assert [m["loops"] for m in other] == [1, 2]
        for a, b in zip(one, other):
            for key in ("dm_loss", "fake_loss", "d_loss", "g_norm", "fake_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-3), (a["loops"], key)


@pytest.mark.xdist_group("ranks")
def test_eq_11_on_shards(two_ranks):
    """psi <- lam psi + (1 - lam) theta on FSDP2 shards of 2 ranks, after a forward pass, against whole weights."""
    two_ranks(PULL_ON_SHARDS)


PULL_ON_SHARDS = """
import torch, torch.distributed as dist
import score_estimator
from engine import distributed
from engine.distributed import shard
from engine.models import load_denoiser

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
added = {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)}
c = {"encoder_hidden_states": torch.zeros(1, 32, 256), "added_cond_kwargs": added}
with torch.no_grad():
    psi(torch.zeros(1, 4, 16, 16), torch.tensor([5]), **c)
score_estimator.pull(psi.parameters(), theta.parameters(), 0.9)
assert all(p.to_local().numel() < p.numel() for p in psi.parameters() if p.shape[0] % 2 == 0)
for p, w in zip(psi.parameters(), whole):
    torch.testing.assert_close(p.full_tensor(), w)
"""


@pytest.mark.xdist_group("ranks")
def test_8_bit_moments_on_shards(two_ranks):
    """torchao's AdamW on FSDP2 shards of 2 ranks, saved and restored, goes on the same; it is AdamW's to a tenth."""
    pytest.importorskip("torchao")
    two_ranks(MOMENTS_ON_SHARDS)


MOMENTS_ON_SHARDS = """
import torch, torch.distributed as dist
from engine import checkpoint
from engine import config
from engine import distributed
from engine.distributed import adamw, shard, update, weights
from engine.models import load_denoiser


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
checkpoint.save(folder, {"G": eight}, {"loops": 3})
again = fresh("adamw8bit")
checkpoint.restore(folder, {"G": again})
for player in (eight, again, plain):
    step(player, 3)
for p, q, r, p_0 in zip(*(weights(player[1]) for player in (eight, again, plain)), start):
    p, q, r = (v.full_tensor() for v in (p, q, r))
    assert torch.equal(p, q) and (p - r).norm() < 0.1 * (r - p_0).norm()
"""


@pytest.mark.xdist_group("ranks")
def test_checkpoint_in_the_background(two_ranks):
    """2 ranks train on while a checkpoint is written: it holds the weights and moments of when save was called."""
    two_ranks(IN_THE_BACKGROUND)


IN_THE_BACKGROUND = """
import torch, torch.distributed as dist
from engine import checkpoint
from engine import distributed
from engine import run_folder
from engine.distributed import shard, update
from engine.models import load_denoiser

net = shard(load_denoiser("toy/sdxl").net, torch.float32)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

def step(gradient):
    for p in net.parameters():
        p.grad = torch.full_like(p, gradient)
    update(optimizer, torch.zeros(()))

step(1.0)
asked_for = [p.full_tensor().clone() for p in net.parameters()]
checkpoint.save(folder, {"G": (net, optimizer)}, {"loops": 1}, background=True)
for _ in range(3):
    step(-1.0)
checkpoint.save(folder, {"G": (net, optimizer)}, {"loops": 4}, keep=2, background=True)
checkpoint.settle()
dist.barrier()
assert [p.name for p in run_folder.checkpoints(folder)] == ["checkpoint-000001", "checkpoint-000004"]
assert checkpoint.load(run_folder.checkpoints(folder)[0], {"G": (net, optimizer)}) == {"loops": 1}
assert all(torch.equal(p.full_tensor(), q) for p, q in zip(net.parameters(), asked_for))
moments = [optimizer.state[p]["exp_avg"] for p in net.parameters()]
tenth = lambda m: torch.full(m.shape, 0.1)  # (1 - beta_1) times the first gradient
assert all(torch.allclose(m.full_tensor(), tenth(m)) for m in moments)
"""


def test_resume_after_kill(small_toys, tmp_path):
    """kill -9 in the middle, then --resume: the same weights as a run that was left alone."""
    settings = {"iterations": 5, "save_every": 2, "model": small_toys["sdxl"]}
    broken = launch(*flags(**{**settings, "iterations": 500}, out=tmp_path / "broken"))
    whole = train.train(train.read(flags(**settings, out=tmp_path / "whole")))
    wait_for(tmp_path / "broken" / "checkpoint-000002")
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    train.train(train.read(flags(iterations=run_loops(tmp_path / "broken") + 3, out=tmp_path / "broken", resume=True)))
    longer = train.train(train.read(flags(iterations=run_loops(tmp_path / "broken"), out=whole, resume=True)))
    a, b = student(longer), student(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [m["loops"] for m in metrics_of(tmp_path / "broken")] == list(range(1, run_loops(longer) + 1))


def run_loops(run):
    """How many loops a run's newest checkpoint has."""
    return json.loads((run_folder.newest(run) / "progress.json").read_text())["loops"]


def test_torn_checkpoint_falls_back_to_the_one_before(small_toys, tmp_path, capsys):
    """The newest checkpoint cut to half: a warning, the one before is resumed, in the end an unbroken run's weights."""
    settings = SMALL | {"gan_weight": 0, "batch_size": 1, "iterations": 3, "save_every": 1, "model": small_toys["sdxl"]}
    run = train.train(Config(**settings, out=str(tmp_path / "run")))
    assert [p.name[-1] for p in run_folder.checkpoints(run)] == ["2", "3"]  # --keep 2
    whole = student(run)
    for part in (run_folder.newest(run) / "state").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    train.train(Config(**settings, out=str(run), resume=True))
    assert "checkpoint-000003" in capsys.readouterr().err and (run / "checkpoint-000003.unreadable").is_dir()
    assert all(torch.equal(whole[k], v) for k, v in student(run).items())
    for path in run_folder.checkpoints(run):
        (path / "state" / ".metadata").unlink()
    with pytest.raises(UserError, match="and no other checkpoint"):
        train.train(Config(**settings, out=str(run), resume=True))


RANKS = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(
    "ranks, number", [(1, signal.SIGTERM), (1, signal.SIGINT), pytest.param(2, signal.SIGINT, marks=RANKS)]
)
def test_a_signal_saves_and_ends(ranks, number, small_toys, tmp_path):
    """SIGTERM or Ctrl-C, to loader processes too: saved at the loop in hand, one line, exit 0 (torchrun's is 1).

    Of tracebacks there is torchrun's own alone. --resume starts afresh in a new folder.
    """
    settings = {"gan_weight": 0, "iterations": 500, "resume": True, "workers": 1, "model": small_toys["sdxl"]}
    ended = launch(*flags(**settings, out=tmp_path / "ended"), ranks=ranks, patience=150)
    wait_for(tmp_path / "ended" / "metrics.jsonl", content=True)
    os.killpg(ended.pid, number) if number == signal.SIGINT else ended.send_signal(number)
    out, _ = ended.communicate(timeout=200)
    loops = run_loops(tmp_path / "ended")
    assert ended.returncode == ranks - 1 and 0 < loops < 500, out[-3000:]
    assert f"stopped after loop {loops} of 500" in out and out.count("Traceback") == ranks - 1


def test_ctrl_c_that_leaves_at_once(tmp_path):
    """The second one, in the loop that the first lets end; and the first one before there is a loop: no traceback."""
    running = launch(*flags(gan_weight=0, iterations=500, batch_size=16, out=tmp_path / "run"))
    wait_for(tmp_path / "run" / "metrics.jsonl", content=True)
    loading = launch(*flags(out=tmp_path / "loading"))
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, _ = running.communicate(timeout=10)
    assert running.returncode == -signal.SIGINT and "Traceback" not in out and not run_folder.newest(tmp_path / "run")
    wait_for(Path(f"/proc/{loading.pid}/maps"), holds="libtorch")
    loading.send_signal(signal.SIGINT)
    out, _ = loading.communicate(timeout=20)
    assert loading.returncode == 130 and out.strip().splitlines()[-1] == "stopped by Ctrl-C" and "Traceback" not in out


@pytest.mark.xdist_group("ranks")
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
"""


@pytest.mark.xdist_group("ranks")
def test_a_killed_rank_restarts_the_run(small_toys, two_ranks, tmp_path):
    """kill -9 on one of two ranks ends the other: torchrun restarts both, and they go on to an unbroken run's weights.

    SIGTERM then ends both after the loop in hand, saved; torchrun's own status is 1, and it names the first death.
    """
    settings = {"gan_weight": 0, "save_every": 1, "keep": 500, "model": small_toys["sdxl"]}
    out = tmp_path / "broken"
    train_on_two(two_ranks, **settings, iterations=2, out=tmp_path / "whole")
    broken = launch(*flags(**settings, iterations=500, workers=1, out=out), ranks=2, restarts=1, patience=12)
    wait_for(out / "checkpoint-000001")
    kill_a_rank(broken)
    before = run_loops(out)
    wait_for(out / f"checkpoint-{before + 2:06d}")
    broken.send_signal(signal.SIGTERM)
    said, _ = broken.communicate(timeout=200)
    assert broken.returncode == 1 and "exitcode: -9" in said, said[-3000:]
    saved = run_folder.checkpoints(out)
    assert before + 2 <= len(saved) < 500 and not list(out.glob("*.tmp"))
    train_on_two(two_ranks, **settings, iterations=before + 1, resume=True, out=tmp_path / "whole")
    a, b = (
        load_file(run / f"checkpoint-{before + 1:06d}/unet/diffusion_pytorch_model.safetensors")
        for run in (tmp_path / "whole", out)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def kill_a_rank(torchrun):
    os.kill(int(Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()[0]), signal.SIGKILL)


def wait_for(path, content=False, holds=""):
    deadline = time.time() + 200
    while not path.exists() or (content or holds) and (not path.read_text() or holds not in path.read_text()):
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
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=0.0, generator=generators, height=64, width=64, output_type="pt"
    ).images
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    ours = generate(G, PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), prompts, 4, 3)
    assert ((ours.clamp(-1, 1) + 1) / 2 - theirs).abs().max() < 2 / 255


def test_export_is_a_pipeline_of_its_own(trained, tmp_path):
    """In plain diffusers, with its folder, the card's two settings and the generator alone, it draws our picture."""
    out = export.export(str(trained), tmp_path / "student")
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generators = sample_generators(3, 0, range(1), "sample")
    theirs = pipeline(
        ["a red circle"],
        num_inference_steps=4,
        guidance_scale=0,
        generator=generators,
        height=64,
        width=64,
        output_type="pt",
    ).images
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    ours = generate(G, PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), ["a red circle"], 4, 3)
    assert ((ours + 1) / 2 - theirs).abs().max() < 2 / 255
    card = (out / "README.md").read_text()
    assert (
        "999, 749, 499, 249" in card
        and "guidance_scale=0" in card
        and "{" not in card.split("## Settings")[0].split("```python")[0]
    )
    with pytest.raises(UserError, match="not empty"):
        export.export(str(trained), out)


def test_picture_does_not_depend_on_the_batch(trained):
    G = load_denoiser("toy/sdxl", student=run_folder.newest(trained))
    encoder, vae, prompts = (
        PromptEncoder("toy/sdxl", 64),
        load_vae("toy/sdxl"),
        ["a red circle", "a blue ring", "a green cross"],
    )
    whole = generate(G, encoder, vae, prompts, 4, 0, batch=3)
    for batch in (1, 2):
        assert (generate(G, encoder, vae, prompts, 4, 0, batch=batch) - whole).abs().max() < 2 / 255
    assert torch.allclose(generate(G, encoder, vae, prompts[2:], 4, 0, first=2)[0], whole[2], atol=2 / 255)
