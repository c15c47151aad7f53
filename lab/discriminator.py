"""What DMD2's discriminator can learn on the toy: it alone is trained, against a frozen student.

    python -m lab.discriminator                          what is missing in results/discriminator.json, then the page
    python -m lab.discriminator --print                  the page alone
    python -m lab.discriminator --student toy/student    AdvDMD's D against one student; nothing is kept
    python -m lab.discriminator --student runs/NAME --states x_0 --block up_blocks.2 --head map

Half of D's latents are real, half are states of the student's sampling (siblings/advdmd.py), at the same prompts. Each
is at one random state, where AdvDMD has all states of each. Printed: the accuracy on held-out prompts, by state.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

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
from lab import pages, rows, steps
from siblings import dmd2, policy

RESULTS = Path("results/discriminator.json")
SDXL, SD3 = "toy/student", "sd3-advdmd-2-no-rl"  # the latter is a row of lab/steps.py
ALONE = "--frozen --states x_0 --steps 200"
ONLINE = "--critic-weight 0.01 --reals 4 --steps 400"  # as in AdvDMD: beside Eq. 6, four candidates of each prompt
EXPERIMENTS = [  # student, flags, seeds
    (SDXL, f"{ALONE} --reals 4", (0,)),
    (SDXL, ALONE, (0,)),
    (SDXL, f"{ALONE} --head map", (0,)),
    (SDXL, f"{ALONE} --block up_blocks.1 --head map", (0,)),
    (SDXL, f"{ALONE} --block up_blocks.2 --head map", (0,)),
    (SDXL, f"{ALONE} --block up_blocks.2", (0,)),
    (SDXL, f"{ONLINE} --block up_blocks.2", (0,)),
    (SD3, ALONE, (0, 1, 2)),
    (SD3, f"{ALONE} --block transformer_blocks.5", (0, 1, 2)),
    (SD3, f"{ONLINE} --block transformer_blocks.5", (0, 1)),
]


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
    """Train D; print the held-out accuracies four times -> score estimator, head, {state: accuracies}, the features."""
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
    features = f"{fake.block}, {channels} x {side} x {side}"
    print(f"features of {features}", flush=True)
    curves = {names[i]: [] for i in chosen}
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
            for i, sides in found.items():
                curves[names[i]].append(sum(sides) / 2)
    return fake, head, curves, features


def experiment(args):
    """-> {state: held-out accuracies at the four quarters}, the features that D reads."""
    student, settings = find_student(args.student)
    seen, S = bank(student, settings, args.bank)
    held_out, _ = bank(student, settings, args.held_out, held_out=True)
    return train(args, settings["model"], seen, held_out, S)[2:]


# ------------------------------------------------------------------------------------------------ the page


def runs():
    """{name: (student, flags, seed)} of all experiments."""
    return {f"{s} {flags} --seed {seed}": (s, flags, seed) for s, flags, seeds in EXPERIMENTS for seed in seeds}


def kept():
    return rows.load(RESULTS, student_crc32=rows.crc32(SDXL, "unet/diffusion_pytorch_model.safetensors"))


def fill():
    """Make what is missing, and keep each when it ends."""
    results = kept()
    for name, (student, flags, seed) in runs().items():
        if name in results:
            continue
        folder = rows.folder(steps.name(SD3, seed, rows.NUM)) if student == SD3 else SDXL
        curves, features = experiment(options([*flags.split(), "--student", str(folder), "--seed", str(seed)]))
        results[name] = {"features": features, "accuracy": curves}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def page():
    """results/discriminator.md, from the experiments that are kept."""
    results = kept()
    headings = (
        "student | seed | features | head | prompts in a batch | score estimator | steps | state | 1/4 | 1/2 | 3/4"
    )
    lines = [f"| {headings} | all |", "|" + " --- |" * 12]
    for name, (student, flags, seed) in runs().items():
        args = options(flags.split())
        how = [args.head, args.reals or args.batch, "frozen" if args.frozen else "trained", args.steps]
        for state, accuracy in results[name]["accuracy"].items() if name in results else ():
            cells = [f"`{student}`", seed, results[name]["features"], *how, state, *(f"{a:.2f}" for a in accuracy)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return pages.joined([INTRODUCTION, lines, pages.wrapped(READ)])


INTRODUCTION = f"""
# What AdvDMD's discriminator can learn on the toy

`python -m lab.discriminator` trains what is missing in [discriminator.json](discriminator.json) and writes this page. D
alone is trained against a frozen student: `{SDXL}`, and of `toy/sd3` a student of two steps (`{SD3}` of
[steps.md](steps.md)). Half of its latents are real, half are the student's states, at the same prompts. The last
columns are its accuracy on held-out prompts after a quarter, a half, three quarters and all of its steps (0.5 is
chance).
"""

READ = """
On `toy/sdxl` the features of the mid block are too coarse: what tells the student's latents from real ones is local,
and 4 x 4 positions have lost it; the last block has it. On `toy/sd3` every block keeps all positions, and D sees. So
`--d-block last` is what the rows of [steps.md](steps.md) have; those of [siblings.md](siblings.md) have DMD2's
features.
Where the score estimator is frozen, the head alone learns. Where it is trained, D's loss has the weight 0.01 beside
Eq. 6, and a batch has four pictures of each prompt, as in AdvDMD.
"""


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", help="write the page from what is there, and train nothing")
    parser.add_argument("--student", default="", help="a run of the toy, or toy/student: train D against it, and print")
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
    if args.student:
        return experiment(args)
    if not args.print:
        fill()
    RESULTS.with_suffix(".md").write_text(page())


if __name__ == "__main__":
    main()
