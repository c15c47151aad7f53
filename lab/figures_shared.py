"""What the walkthrough's pictures share: the toy's networks, three short runs, and what scenes and noise they show."""

import json
import shlex
from functools import cache
from pathlib import Path

import torch

import train
from diffusion import backward_simulation, guided, randn, sample_generators
from engine import checkpoint, run_folder
from engine.config import Config
from engine.models import load_denoiser, load_vae
from engine.networks import assemble
from engine.prompts import load_encoder
from engine.reward_model import load_reward_model
from toy import world

RUNS = Path("runs/figures")
SHORT = "--stage 1 --batch-size 8 --iterations 80 --lr 8e-5 --fake-lr 5e-4 --preview-every 0 --log-every 2"
FLAGS = {"pull": SHORT, "no-pull": f"{SHORT} --ema 1", "dmd2": f"{SHORT} --method dmd2 --ttur 2"}
SCENE = 1  # the held-out scene that most pictures show


@cache
def encoder():
    return load_encoder(Config.model, world.SIZE)


@cache
def vae():
    return load_vae(Config.model)


@cache
def teacher(w=Config.teacher_guidance):
    denoiser = load_denoiser(Config.model)
    denoiser.net.eval()
    return guided(denoiser, encoder().null(), w)


@cache
def reward():
    """R, the toy's latent reward model."""
    return load_reward_model(str(Path(Config.model).with_name("lrm")), world.SIZE, Config.model)


@cache
def student():
    denoiser = load_denoiser(Config.model, student=run_folder.SHIPPED)
    denoiser.net.eval()
    return denoiser


@cache
def trained(name):
    """The networks at the end of a run of FLAGS, which is trained here unless it is there."""
    config = train.read([*shlex.split(FLAGS[name]), "--out", str(RUNS / name), "--overwrite"])
    if not finished(name, config.iterations):
        print(f"training {RUNS / name}: python train.py {FLAGS[name]}", flush=True)
        with torch.enable_grad():  # a picture is drawn without
            train.train(config)
    nets = assemble(config, 1, torch.device("cpu"), train.method(config)[0])
    checkpoint.load(run_folder.newest(RUNS / name), nets.players, optimizers=False)
    for net in (nets.G.net, nets.fake.net):
        net.eval()
    return nets


def finished(name, loops):
    path = run_folder.newest(RUNS / name)
    return path is not None and json.loads((path / "progress.json").read_text())["loops"] == loops


def recorded(name):
    """The lines of a run's metrics.jsonl."""
    trained(name)
    return [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]


def prompts(*which):
    """Captions of held-out scenes, and their condition."""
    words = [world.scene(i, "test")[1] for i in which]
    return words, encoder().encode(words)


def generators(n, purpose, seed=0):
    return sample_generators(seed, 0, range(n), purpose)


def noise(n, purpose, seed=0):
    """(n, 4, 16, 16): the same with every call."""
    return randn(generators(n, purpose, seed), torch.empty(n, vae().channels, 16, 16))


def real_latents(n, first=0):
    """Latents of n held-out scenes and their condition."""
    scenes = [world.scene(i, "test") for i in range(first, first + n)]
    return vae().encode(torch.stack([world.render(s) for s, _ in scenes])), encoder().encode([c for _, c in scenes])


def made_latents(G, S, n, first=0):
    """G's finished samples for the prompts of the same scenes."""
    _, c = prompts(*range(first, first + n))
    return backward_simulation(G, noise(n, "made"), c, S, generators(n, "made steps")), c


def decode(z):
    with torch.no_grad():
        return vae().decode(z).clamp(-1, 1)


def levels(n):
    """n noise levels over the range of Eq. 6, least noisy first, (n,)."""
    return student().schedule.t_at(torch.linspace(0.03, 0.97, n))
