"""DMDR: its schedules' end points and moments, the reward's gradient by finite differences, --preset dmdr."""

import json
from dataclasses import replace

import pytest
import torch

import train
from diffusion import add_noise, sample_generators
from engine import run_folder
from engine.batch import Batch
from engine.errors import UserError
from engine.metrics import Clip
from engine.models import add_lora, load_denoiser, load_vae
from engine.networks import assemble
from engine.prompts import PromptEncoder
from engine.reward_model import load_reward_model
from engine.run_folder import look
from siblings import cold_start, dmdr
from siblings.reward import reward_loss


@pytest.fixture(scope="module")
def scene():
    encoder = PromptEncoder("toy/sdxl", 64)
    x_t, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return encoder, x_t, eps, torch.tensor([300, 800]), ["a red circle", "a blue ring"]


def test_cold_start_schedule():
    assert [cold_start.c_at(k, 100) for k in (0, 100, 250)] == [1, 0, 0] and cold_start.c_at(50, 100) == pytest.approx(
        0.5
    )
    assert cold_start.c_at(0, 0) == 0


@torch.no_grad()
def test_dynadg_is_the_teacher_bit_for_bit_at_the_end(scene):
    """A trained LoRA at scale 0 leaves the teacher, at 2 the score estimator, which comes back as it was."""
    encoder, x_t, _, t, prompts = scene
    teacher, fake = load_denoiser("toy/sdxl"), load_denoiser("toy/sdxl")
    c = encoder.encode(prompts)
    add_lora(fake.net, 4, "fake")
    fake.scales = {"fake": cold_start.FAKE_SCALE}
    assert torch.equal(fake(x_t, t, c), teacher(x_t, t, c))  # a new LoRA is zero
    torch.manual_seed(0)
    for name, p in fake.net.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            p.normal_(std=0.05)
    moved = fake(x_t, t, c)
    assert torch.equal(cold_start.real_score(fake, 0.75 * cold_start.c_at(100, 100))(x_t, t, c), teacher(x_t, t, c))
    assert torch.equal(cold_start.real_score(fake, cold_start.FAKE_SCALE)(x_t, t, c), moved) and torch.equal(
        fake(x_t, t, c), moved
    )
    near, far = ((cold_start.real_score(fake, s)(x_t, t, c) - moved).norm() for s in (0.75, 0.1))
    assert 0 < near < far < (teacher(x_t, t, c) - moved).norm()


@pytest.mark.parametrize("k, a, b", [(0, 4, 1.5), (50, 2.5, 1.25), (100, 1, 1)])
def test_dynars_moments(k, a, b):
    u = cold_start.noise_level(sample_generators(0, 0, range(4000), "renoise"), k, 100).double()
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert u.mean().item() == pytest.approx(a / (a + b), abs=4 * (variance / 4000) ** 0.5)
    assert u.var().item() == pytest.approx(variance, rel=0.1) and 0 <= u.min() and u.max() <= 1


@pytest.mark.parametrize("kind", ["lrm", "clip"])
def test_reward_gradient_through_one_step(kind, scene):
    """The gradient of R(G(z)) in the generator's weights by a central difference: the latent reward model, and CLIP."""
    encoder, z, eps, _, prompts = scene
    G, vae = load_denoiser("toy/sdxl"), load_vae("toy/sdxl")
    c, tau = encoder.encode(prompts), torch.tensor([499, 499])
    if kind == "lrm":
        R, s = load_reward_model("toy/lrm", 64, "toy/sdxl"), torch.tensor([249, 249])
        reward, margin = lambda x: R(add_noise(G.schedule, x, s, eps), s, R.encoder.encode(prompts)), 20.0  # noqa: E731
    else:
        clip = Clip("toy/clip")
        reward, margin = lambda x: clip.score(clip.features(vae.decode(x)), prompts), 1.0  # noqa: E731
    value = lambda: reward_loss(reward, G(z, tau, c), margin)[0]  # noqa: E731
    value().backward()
    weight = G.net.conv_out.weight
    slope, direction = weight.grad.norm().item(), weight.grad / weight.grad.norm()
    ends, h = [], 3e-5
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * h * direction
            ends.append(value().item())
    assert slope > 0 and (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=0.02)
    assert reward_loss(lambda x: torch.tensor([3.0, 1.0]), None, 2.0)[0] == 0.5  # above the margin it is 0


def test_preset_dmdr_moves_who_it_should(small_toys, tmp_path):
    """K = 1: reward joins at G's second update; the score estimator's LoRA alone learns; a resumed run goes on."""
    few = "--lr-schedule constant --batch-size 4 --save-every 3 --preview-every 0 --log-every 1"
    flags = f"--preset dmdr --dynamic 1 --ttur 2 --fake-lora 4 --model {small_toys['sdxl']} {few}".split()
    whole = train.train(train.read([*flags, "--iterations", "4", "--out", str(tmp_path / "whole")]))
    logged = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert ["reward" in m for m in logged] == [False, False, False, True] and logged[-1]["generator_updates"] == 2
    train.train(train.read([*flags, "--iterations", "3", "--out", str(tmp_path / "half")]))
    half = train.train(train.read(["--resume", "--iterations", "4", "--out", str(tmp_path / "half")]))
    state = [torch.load(_whole(run, tmp_path), weights_only=True) for run in (whole, half)]
    assert state[0]["fake"]["model"].keys() == state[1]["fake"]["model"].keys()
    for name, p in state[0]["fake"]["model"].items():
        assert "lora_" in name and torch.equal(p, state[1]["fake"]["model"][name]), name
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in state[0]["fake"]["model"].items())


def _whole(run, folder):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = folder / f"{run.name}.pt"
    dcp_to_torch_save(run_folder.newest(run) / "state", path)
    return path


@pytest.mark.parametrize("start, last", [("1", 2), ("2", 4)])
def test_reward_joins_and_rates_are_halved(start, last):
    """K = 1 at TTUR 2: up to the loop `last` the whole rates and no reward, then half of them, of G and the estimator.

    The demo's start, 2 K, is two loops later.
    """
    flags = "--preset dmdr --dynamic 1 --ttur 2 --fake-lora 4 --lr-schedule constant --lr 1e-6 --fake-lr 1e-6".split()
    config = train.read([*flags, "--reward-start", start, "--batch-size", "2"])
    nets = assemble(config, 1, torch.device("cpu"), dmdr.prepare)
    prompts = ["a red circle", "a blue ring"]
    batch = Batch(torch.zeros(2, 3, 64, 64), prompts, nets.encoder.encode(prompts), [0, 1], loop=1)
    rates, rewarded = [], []
    for loop in range(1, last + 3):
        nets.pace(loop)
        logged = dmdr.iterate(nets, replace(batch, loop=loop), loop)
        rewarded.append("reward" in logged)
        rates.append([nets.players[name][1].param_groups[0]["lr"] for name in ("G", "fake")])
    assert rates == [[1e-6, 1e-6]] * last + [[5e-7, 5e-7]] * 2
    assert rewarded == [False] * (last + 1) + [True]  # G moves in every second loop


@pytest.mark.parametrize("model, more", [("toy/sdxl", set()), ("toy/sd3", {"add_q_proj", "add_v_proj"})])
def test_lora_on_queries_and_values(model, more):
    """--lora-layers qv: nothing but these layers of attention is trained in the score estimator, and all of them."""
    flags = f"--method dmdr --model {model} --lora-layers qv --fake-lora 4 --reward-weight 0 --batch-size 2".split()
    nets = assemble(train.read(flags), 1, torch.device("cpu"), dmdr.prepare)
    modules = dict(nets.fake.net.named_modules())
    trained = {name.split(".lora_")[0] for name, p in nets.fake.net.named_parameters() if p.requires_grad}
    names = {"to_q", "to_v"} | more
    assert trained == {name for name in modules if name.split(".")[-1] in names} and trained
    assert {name.split(".")[-1] for name in trained} == names


def test_grpo_run(small_toys, tmp_path):
    """--rl grpo: from the cold start's end on each update of G has a policy loss, over rollouts in groups."""
    few = "--lr-schedule constant --batch-size 4 --candidates 2 --save-every 9 --preview-every 0 --log-every 1"
    flags = f"--preset dmdr --rl grpo --dynamic 1 --ttur 1 --iterations 2 --model {small_toys['sdxl']} {few}".split()
    run = train.train(train.read([*flags, "--out", str(tmp_path / "run")]))
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "rl_loss" not in first and second["rl_loss"] != 0 and "reward" in second
    with pytest.raises(UserError, match="--lora-layers all, not qv"):
        look(train.read(["--resume", "--out", str(run), "--lora-layers", "qv"]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dynamic", "5", "--fake-lora", "0"], "--fake-lora"),
        (["--fake-lora", "4", "--ema", "0.9"], "--ema 1"),
        (["--gan-weight", "0.1"], "no GAN"),
        (["--teacher", "toy/sdxl"], "--teacher needs --dynamic 0"),
        (["--reward-weight", "-1"], "--reward-weight"),
        (["--reward-start", "-1"], "--reward-start"),
        (["--lora-layers", "qv", "--lora-rank", "4"], "--lora-rank out"),
        (["--lora-layers", "qv", "--fake-lora", "0", "--dynamic", "0"], "--fake-lora"),
    ],
)
def test_flags_that_exclude_each_other(flags, words):
    with pytest.raises(UserError, match=words):
        look(train.read(["--method", "dmdr", *flags]))


def test_a_single_step_has_no_density():
    """GRPO needs a step with noise after it; a back-propagated reward does not, and w = 0 reinforces nothing."""
    with pytest.raises(UserError, match="--rl grpo needs --student-steps 2"):
        dmdr.Settings(rl="grpo", student_steps=1).check()
    for settings in ({"rl": "grpo", "reward_weight": 0.0}, {"rl": "backprop"}):
        dmdr.Settings(student_steps=1, **settings).check()
