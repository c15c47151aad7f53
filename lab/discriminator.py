"""What DMD2's discriminator can learn on the toy: it alone is trained, against a frozen student.

    python -m lab.discriminator                                       AdvDMD's D against toy/student
    python -m lab.discriminator --block up_blocks.2 --head map        other features, a logit for each position
    python -m lab.discriminator --student runs/NAME --states x_0      another student, its finished latents alone

Half of D's latents are real, half are states of the student's sampling (siblings/advdmd.py), at the same prompts. Each
is at one random state, where AdvDMD has all states of each. Printed: the accuracy on held-out prompts, by state.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import score_estimator
from diffusion import add_noise, randn, sample_generators, times
from engine import data
from engine.flags import at_least
from engine.models import load_denoiser, load_vae
from engine.prompts import load_encoder
from engine.run_folder import find_student
from siblings import dmd2, policy


@dataclass
class Bank:
    """Real pictures' latents and the states of the student's rollouts, at the same prompts."""

    real: torch.Tensor  # (N, C, h, w)
    states: torch.Tensor  # (N, K, C, h, w): z_s at S[1:], and x_0
    c: dict


@torch.no_grad()
def bank(student, settings, n, held_out=False, at_once=64):
    """-> a Bank of n scenes of the toy: training's, or those that training never sees."""
    model = settings["model"]
    G, vae = load_denoiser(model, student=student), load_vae(model)
    S = G.schedule.steps(settings["student_steps"])
    source = data.source("toy", settings["resolution"])
    if held_out:
        images, prompts = source.held_out(0, n)
    else:
        images, prompts, _ = zip(*(source[i] for i in range(n)))
        images = torch.stack(images)
    c = load_encoder(model, settings["resolution"]).encode(list(prompts))
    real = torch.cat([vae.encode(part) for part in images.split(at_once)])
    states = []
    for first in range(0, n, at_once):
        rows = slice(first, first + at_once)
        rng = sample_generators(int(held_out), 0, range(n)[rows], "bank")
        z = randn(rng, real[rows])
        states.append(torch.stack(policy.simulate(G, z, {k: v[rows] for k, v in c.items()}, S, rng)[1:], 1))
    return Bank(real, torch.cat(states), c), S


def pairs(fake, found, rows, which, S, eps):
    """Real and made latents of these rows at state `which` (B,) of S[1:], 0 -> real, made, t, c."""
    levels = torch.stack([*S[1:], torch.zeros_like(S[0])])
    t = levels[which]
    noised = add_noise(fake.schedule, found.real[rows], t, eps)
    clean = (which == len(S) - 1).view(-1, 1, 1, 1)
    c = {k: v[rows] for k, v in found.c.items()}
    return torch.where(clean, found.real[rows], noised), found.states[rows, which], t, c


def logits(fake, head, z, t, c):
    """D's logits, (B,)."""
    return head(fake.with_features(z, t, c)[1])


@torch.no_grad()
def accuracies(fake, head, held_out, S, chosen, at_once=64):
    """The fraction of held-out latents on the right side of 0, (real, made) by state."""
    found = {}
    n = len(held_out.real)
    for i in chosen:
        right = torch.zeros(2)
        for first in range(0, n, at_once):
            rows = torch.arange(first, min(first + at_once, n))
            eps = randn(sample_generators(2, 0, rows.tolist(), "eps"), held_out.real[rows])
            real, made, t, c = pairs(fake, held_out, rows, torch.full_like(rows, i), S, eps)
            right[0] += (logits(fake, head, real, t, c) > 0).sum()
            right[1] += (logits(fake, head, made, t, c) <= 0).sum()
        found[i] = (right / n).tolist()
    return found


def train(args, model, seen, held_out, S):
    """Train D; print the held-out accuracies four times."""
    torch.manual_seed(args.seed)
    fake = load_denoiser(model)
    fake.block = args.block or fake.block
    fake.net.requires_grad_(not args.frozen)
    with torch.no_grad():
        one = {k: v[:1] for k, v in seen.c.items()}
        _, channels, side, _ = fake.with_features(seen.real[:1], times(S[-1], seen.real[:1]), one)[1].shape
    head = dmd2.Head(channels, side, args.head)
    trained = [*head.parameters()] + ([] if args.frozen else [*fake.net.parameters()])
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    chosen = {"all": range(len(S)), "x_0": [len(S) - 1]}[args.states]
    names = [f"z_{t:g}" for t in S[1:].tolist()] + ["x_0"]
    print(f"features of {fake.block}: {channels} x {side} x {side}", flush=True)
    n, began = len(seen.real), time.time()
    for step in range(1, args.steps + 1):
        rows = torch.randint(n, (args.reals or args.batch,)).repeat_interleave(args.batch // (args.reals or args.batch))
        which = torch.tensor(list(chosen))[torch.randint(len(chosen), (args.batch,))]
        real, made, t, c = pairs(fake, seen, rows, which, S, torch.randn_like(seen.real[rows]))
        L = F.softplus(-logits(fake, head, real, t, c)).mean() + F.softplus(logits(fake, head, made, t, c)).mean()
        if args.critic_weight:
            x = seen.states[rows, -1]
            t, eps = score_estimator.draw(fake.schedule, sample_generators(args.seed, step, range(len(x)), "fake"), x)
            L = score_estimator.loss(fake, x, t, eps, c) + args.critic_weight * L
        optimizer.zero_grad()
        L.backward()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(fake.net.parameters(), args.clip_grad)
        optimizer.step()
        if step % max(1, args.steps // 4) == 0:
            found = accuracies(fake, head, held_out, S, chosen)
            told = ", ".join(f"{names[i]} {(a + b) / 2:.2f} ({a:.2f} {b:.2f})" for i, (a, b) in found.items())
            print(f"step {step}, {time.time() - began:.0f} s, loss {L.item():.3f}; held out: {told}", flush=True)
    return fake, head


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="", help="a run of the toy; default the newest, or toy/student")
    parser.add_argument("--block", default="", help="whose output D reads; default the middle one (engine/hidden.py)")
    parser.add_argument("--head", choices=("scaled", "map"), default="scaled", help="one logit, or one for a position")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    parser.add_argument("--states", choices=("all", "x_0"), default="all")
    parser.add_argument("--batch", type=at_least(1), default=16, help="latents of each kind in a step")
    parser.add_argument("--reals", type=at_least(0), default=0, help="distinct prompts in a batch; 0: all of them")
    parser.add_argument("--bank", type=at_least(1), default=1024, help="scenes that D is trained on")
    parser.add_argument("--held-out", type=at_least(1), default=256, help="scenes that D is judged on")
    parser.add_argument("--steps", type=at_least(1), default=400)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--critic-weight", type=float, default=0.0, help="D's loss beside Eq. 6; 0: alone")
    parser.add_argument("--clip-grad", type=float, default=0.0, help="of the score estimator; 0: none")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser.parse_args(argv)


def main():
    args = options()
    student, settings = find_student(args.student)
    seen, S = bank(student, settings, args.bank)
    held_out, _ = bank(student, settings, args.held_out, held_out=True)
    train(args, settings["model"], seen, held_out, S)


if __name__ == "__main__":
    main()
