"""What lab.plane measures of a student in the plane, and draws: docs/plane.png, docs/plane.gif.

The noised student is a Gaussian mixture over its samples, with a kernel of the noise's size. So its density and its
score are closed forms, of samples: estimates, each with its error.
"""

import io
import math

import matplotlib.pyplot as plt
import torch
from PIL import Image

import dmd
from diffusion import add_noise, backward_simulation, times
from lab import mixture
from lab.mixture import CLASSES, MEANS, SCHEDULE, STD, STEPS, WEIGHTS, classes, log_density, points

LEVELS = tuple(range(100, 1000, 100))  # the noise levels t
CENTRES, FRESH = 3334, 300  # of each class: the samples that stand for the density, and those that it is measured at


@torch.no_grad()
def student(G, n, seed):
    """n finished points of the four-step student in each class: x (runs * CLASSES, 2, n, 1) and c."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(G.runs * CLASSES, 2, n, 1, generator=rng)
    c = classes(CLASSES, G.runs)
    return backward_simulation(G, z, c, STEPS, [rng] * len(z)), c


def kernels(x_t, own, alpha, sigma):
    """The mixture of N(α x_i, σ²) over points x_i: log p(x_t) (C, m), E[x_0 | x_t] (C, m, 2).

    x_t (C, m, 2), own (C, n, 2): points of C classes; alpha, sigma: of one noise level.
    """
    near = torch.cdist(x_t, alpha * own).square() / (-2 * sigma**2)
    return near.logsumexp(2) - math.log(2 * math.pi * sigma**2 * own.shape[1]), near.softmax(2) @ own


def at_level(x_t, own, log_real, x0_fake, alpha, sigma):
    """One run at one noise level: KL(student || mixture), and the squared error of the score estimator's ε̂.

    x_t (C, m, 2): fresh samples, noised; own (C, n, 2): others, clean, for the kernels; log_real (C, m), x0_fake
    (C, m, 2): the mixture's log density and the score estimator's clean estimate of x_t.
    Errors: of the KL its standard error over x_t, and the bias of the kernels' log density (in proportion to 1/n: half
    of the samples have twice the bias of all); of the score error the part that is the kernels' noise, a quarter of the
    mean squared difference between the two halves' scores.
    """
    log_p, mean = map(torch.stack, zip(*(kernels(x_t, half, alpha, sigma) for half in own.chunk(2, 1))))  # (2, ...)
    ratio = log_p.logsumexp(0) - math.log(2) - log_real
    x_0 = (log_p.softmax(0)[..., None] * mean).sum(0)
    squared = lambda difference: (alpha / sigma * difference).square().sum(-1).mean()  # noqa: E731
    found = {
        "kl": ratio.mean(),
        "kl_error": ratio.std() / ratio.numel() ** 0.5,
        "kl_bias": (log_p - log_real).mean() - ratio.mean(),
        "score_error": squared(x0_fake - x_0),
        "score_noise": squared(mean[0] - mean[1]) / 4,
    }
    return {name: round(number.item(), 5) for name, number in found.items()}


@torch.no_grad()
def levels(fake, x, own, ts=LEVELS):
    """at_level of every run at every level -> a list over runs of {name: list over ts}. x, own: `student`'s points."""
    c = classes(CLASSES, fake.runs)
    by_run = lambda values: values.view(fake.runs, CLASSES, *values.shape[1:])  # noqa: E731
    found = []
    for t in ts:
        t = times(torch.tensor(float(t)), x)
        x_t = add_noise(SCHEDULE, x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        parts = points(x_t), points(own), log_density(x_t, t, c), points(fake(x_t, t, c))
        level = SCHEDULE.alpha(t[:1]).item(), SCHEDULE.sigma(t[:1]).item()
        found.append([at_level(*values, *level) for values in zip(*map(by_run, parts))])
    return [{name: [level[run][name] for level in found] for name in found[0][run]} for run in range(fake.runs)]


def coverage(x):
    """Of a run's points (CLASSES, 2, n, 1): the share of modes with at least half their points, the share of strays.

    A point is a mode's within 4 STD, and a stray where it is so near to none of its class.
    """
    near, mode = torch.cdist(points(x), MEANS).min(2)  # (CLASSES, n)
    inside = torch.nn.functional.one_hot(mode, len(WEIGHTS)) * (near < 4 * STD)[..., None]
    covered = inside.float().mean(1) >= torch.tensor(WEIGHTS) / 2
    return covered.float().mean().item(), (near >= 4 * STD).float().mean().item()


def measured(trainer, centres=CENTRES):
    """Everything that is measured of a finished run -> one dict per run of the stack."""
    own, _ = student(trainer.G, centres, 2)
    rows = levels(trainer.fake, student(trainer.G, FRESH, 1)[0], own)
    for row, x in zip(rows, own.chunk(len(rows))):
        row["coverage"], row["strays"] = coverage(x)
        row["reward"] = mixture.outward(x, classes(CLASSES)).mean().item()
        row["second_reward"] = mixture.arrived(x, classes(CLASSES)).mean().item()
    return rows


# -------------------------------------------------------------------------------------------- the pictures

COLORS = ("#3b5bdb", "#e8590c", "#0b8f6f")  # of the classes
SHOWN, ARROWS = 150, 20  # points of each class, and those that have an arrow
NOISE = 300  # the t of the arrows
EDGE = 2.6  # of the axes
FRAMES = 21


def seen(trainer):
    """The student's points, from the same noise in every call, and s_real - s_fake at some: (3, n, 2), (3, ARROWS, 2).

    An arrow is a mean over 64 draws of ε at t = NOISE.
    """
    x, c = student(trainer.G, SHOWN, 5)
    few = x[:, :, :ARROWS].repeat(1, 1, 64, 1)
    eps = torch.randn(few.shape, generator=torch.Generator().manual_seed(6))
    t = torch.full((CLASSES,), float(NOISE))
    raises_kl, _ = dmd.score_difference(mixture.teacher, trainer.fake, few, t, eps, c)
    return points(x), -points(raises_kl).view(CLASSES, 64, ARROWS, 2).mean(1)


def panel(ax, shown, title, arrows=True, goal=False):
    """The mixture's density and the student's points in every class's colour, arrows. goal: the reward's modes."""
    side = torch.linspace(-EDGE, EDGE, 100)
    grid = torch.cartesian_prod(side, side).T.view(1, 2, -1, 1)
    density = log_density(grid.expand(CLASSES, -1, -1, -1), torch.zeros(CLASSES), classes(CLASSES)).exp()
    for color, p, x, arrow in zip(COLORS, density.view(CLASSES, 100, 100), *shown):
        for level in (0.03, 0.15, 0.5):
            ax.contourf(side, side, p.T, levels=[level, 9], colors=color, alpha=0.12)
        ax.scatter(*x.T, s=6, c=color, linewidths=0, alpha=0.85)
        if arrows:
            ax.quiver(*x[:ARROWS].T, *arrow.T / 2, angles="xy", scale_units="xy", scale=1, width=0.006, color="#343a40")
    if goal:
        ax.scatter(*mixture.OUTER.T, marker="*", s=110, c="white", edgecolors="#212529", linewidths=0.8, zorder=3)
    ax.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    ax.set_title(title, fontsize=9)


def curves(axes, trainers):
    """KL and the score estimator's error at every noise level."""
    names = {"kl": "KL(student || mixture), nats", "score_error": "score estimator's squared error of ε̂"}
    errors = {"kl": "kl_error", "score_error": "score_noise"}  # what is below them is not drawn
    found = [levels(v.fake, student(v.G, FRESH, 1)[0], student(v.G, 2000, 2)[0])[0] for v in trainers.values()]
    for ax, (measure, name) in zip(axes, names.items()):
        for title, row in zip(trainers, found):
            shown = [v if v > e else math.nan for v, e in zip(row[measure], row[errors[measure]])]
            ax.plot(LEVELS, shown, "o-", ms=3, lw=1.2, label=title)
        ax.set(yscale="log", xlabel="noise level t")
        ax.set_title(name, fontsize=9)
        ax.grid(color="0.9", lw=0.6)
    axes[1].legend(fontsize=6.5, frameon=False)


def animate(frames, path):
    """A frame for each entry, {update: seen}; the last stays. One palette for all keeps the file small."""
    images = []
    for done, shown in frames.items():
        figure, ax = plt.subplots(figsize=(4, 4.2), layout="constrained")
        panel(ax, shown, f"after {done} updates of G; arrows: s_real - s_fake at t = {NOISE}")
        file = io.BytesIO()
        figure.savefig(file, dpi=90)
        plt.close(figure)
        images.append(Image.open(file).convert("RGB"))
    palette = images[0].quantize(48)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [160] * (len(small) - 1) + [2500]
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)


def pictures(runs, start):
    """Trains the runs, {title: settings}, of which the first is the standard one, and draws both pictures."""
    frames = {}

    def see(trainer, done):
        if done % (trainer.settings.updates // FRAMES) == 0:
            frames[done] = seen(trainer)

    (standard, base), *others = runs.items()
    trainers = {"undistilled": start, standard: mixture.train(start, base, 0, see)}
    for title, settings in others:
        trainers[title] = mixture.train(trainers[standard] if settings.stage == 2 else start, settings, 0)
    figure, axes = plt.subplots(3, 4, figsize=(12, 9.6), layout="constrained")
    updates = sorted(frames)
    for ax, done in zip(axes[0], (updates[0], updates[2], updates[len(updates) // 3], updates[-1])):
        panel(ax, frames[done], f"{standard}\nafter {done} updates of G")
    for ax, (title, settings) in zip(axes.flat[4:], others):
        panel(ax, seen(trainers[title]), title, arrows=False, goal=settings.stage == 2)
    curves(axes[2, 2:], trainers)
    figure.savefig("docs/plane.png", dpi=90)
    plt.close(figure)
    animate(frames, "docs/plane.gif")
