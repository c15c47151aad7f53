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
from siblings import dmdr


@pytest.fixture(scope="module")
def scene():
    encoder = PromptEncoder("toy/sdxl", 64)
    x_t, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return encoder, x_t, eps, torch.tensor([300, 800]), ["a red circle", "a blue ring"]


def test_cold_start_schedule():
    assert [dmdr.c_at(k, 100) for k in (0, 100, 250)] == [1, 0, 0] and dmdr.c_at(50, 100) == pytest.approx(0.5)
    assert dmdr.c_at(0, 0) == 0


@torch.no_grad()
def test_dynadg_is_the_teacher_bit_for_bit_at_the_end(scene):
    """A trained LoRA at scale 0 leaves the teacher, at 2 the score estimator, which comes back as it was."""
    encoder, x_t, _, t, prompts = scene
    teacher, fake = load_denoiser("toy/sdxl"), load_denoiser("toy/sdxl")
    c = encoder.encode(prompts)
    add_lora(fake.net, 4, "fake")
    fake.scales = {"fake": dmdr.FAKE_SCALE}
    assert torch.equal(fake(x_t, t, c), teacher(x_t, t, c))  # a new LoRA is zero
    torch.manual_seed(0)
    for name, p in fake.net.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            p.normal_(std=0.05)
    moved = fake(x_t, t, c)
    assert torch.equal(dmdr.real_score(fake, 0.75 * dmdr.c_at(100, 100))(x_t, t, c), teacher(x_t, t, c))
    assert torch.equal(dmdr.real_score(fake, dmdr.FAKE_SCALE)(x_t, t, c), moved) and torch.equal(fake(x_t, t, c), moved)
    near, far = ((dmdr.real_score(fake, s)(x_t, t, c) - moved).norm() for s in (0.75, 0.1))
    assert 0 < near < far < (teacher(x_t, t, c) - moved).norm()


@pytest.mark.parametrize("k, a, b", [(0, 4, 1.5), (50, 2.5, 1.25), (100, 1, 1)])
def test_dynars_moments(k, a, b):
    u = dmdr.noise_level(sample_generators(0, 0, range(4000), "renoise"), k, 100).double()
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
    value = lambda: dmdr.reward_loss(reward, G(z, tau, c), margin)[0]  # noqa: E731
    value().backward()
    weight = G.net.conv_out.weight
    slope, direction = weight.grad.norm().item(), weight.grad / weight.grad.norm()
    ends, h = [], 3e-5
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * h * direction
            ends.append(value().item())
    assert slope > 0 and (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=0.02)
    assert dmdr.reward_loss(lambda x: torch.tensor([3.0, 1.0]), None, 2.0)[0] == 0.5  # above the margin it is 0


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


def test_rates_are_halved_once_reward_has_joined():
    """K = 1 at TTUR 2: in loops 1 and 2 the whole rates, from loop 3 on half of them, of G and the score estimator."""
    flags = "--preset dmdr --dynamic 1 --ttur 2 --fake-lora 4 --lr-schedule constant --lr 1e-6 --fake-lr 1e-6".split()
    config = train.read([*flags, "--batch-size", "2"])
    nets = assemble(config, 1, torch.device("cpu"), dmdr.prepare)
    prompts = ["a red circle", "a blue ring"]
    batch = Batch(torch.zeros(2, 3, 64, 64), prompts, nets.encoder.encode(prompts), [0, 1], loop=1)
    rates = []
    for loop in range(1, 5):
        nets.pace(loop)
        dmdr.iterate(nets, replace(batch, loop=loop), loop)
        rates.append([nets.players[name][1].param_groups[0]["lr"] for name in ("G", "fake")])
    assert rates == [[1e-6, 1e-6]] * 2 + [[5e-7, 5e-7]] * 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dynamic", "5", "--fake-lora", "0"], "--fake-lora"),
        (["--fake-lora", "4", "--ema", "0.9"], "--ema 1"),
        (["--gan-weight", "0.1"], "no GAN"),
        (["--reward-weight", "-1"], "--reward-weight"),
    ],
)
def test_flags_that_exclude_each_other(flags, words):
    with pytest.raises(UserError, match=words):
        look(train.read(["--method", "dmdr", *flags]))
