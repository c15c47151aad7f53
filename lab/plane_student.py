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
from lab.mixture import (
    CLASSES,
    LOG_WEIGHTS,
    MEANS,
    OUTER,
    SCHEDULE,
    STD,
    STEPS,
    WEIGHTS,
    Game,
    arrived,
    classes,
    log_density,
    outward,
    play,
)

LEVELS = tuple(range(100, 1000, 100))  # the noise levels t
MEASURED, FRESH = 10_002, 900  # the student's samples that stand for its density, and those that it is measured at


@torch.no_grad()
def student(G, n, seed):
    """n finished points of the four-step student in every run, (runs * n, 2, 1, 1), and their classes."""
    rng = torch.Generator().manual_seed(seed)
    c = classes(n, G.runs)
    z = torch.randn(len(c["class"]), 2, 1, 1, generator=rng)
    return backward_simulation(G, z, c, STEPS, [rng] * len(z)), c


def by_class(x, runs):
    """Points, or a value of each -> (runs, CLASSES, points, ...)."""
    return x.view(runs, -1, CLASSES, *x.shape[1:2]).transpose(1, 2)


def kernels(x_t, own, alpha, sigma):
    """Two mixtures of N(α x_i, σ²), one over each half of the samples: log p(x_t) (2, C, m), E[x_0 | x_t] (2, C, m, 2).

    x_t (C, m, 2), own samples (C, n, 2), of C classes; alpha, sigma: of one noise level.
    """
    log_p, mean = [], []
    for half in own.chunk(2, 1):
        near = torch.cdist(x_t, alpha * half).square() / (-2 * sigma**2)
        log_p.append(near.logsumexp(2) - math.log(2 * math.pi * sigma**2 * half.shape[1]))
        mean.append(near.softmax(2) @ half)
    return torch.stack(log_p), torch.stack(mean)


def at_level(x_t, own, log_real, x0_fake, alpha, sigma):
    """One run at one noise level -> KL(student || mixture) and the squared error of the score estimator's ε̂.

    x_t (C, m, 2): fresh samples, noised; own (C, n, 2): others, clean, for the kernels; log_real (C, m), x0_fake
    (C, m, 2): the mixture's log density and the score estimator's clean estimate of x_t.
    Each with its error: for the KL the standard error over x_t, and the bias of the kernels' log density (Jensen: in
    proportion to 1/n, so half of the samples have twice the bias of all); for the score the noise of the kernels', a
    quarter of the mean squared difference between the two halves', which is part of the figure.
    """
    log_p, mean = kernels(x_t, own, alpha, sigma)
    ratio = log_p.logsumexp(0) - math.log(2) - log_real
    x_0 = (log_p.softmax(0)[..., None] * mean).sum(0)
    squared = lambda difference: (alpha / sigma * difference).square().sum(-1).mean().item()  # noqa: E731
    return {
        "kl": ratio.mean().item(),
        "kl_error": (ratio.std() / ratio.numel() ** 0.5).item(),
        "kl_bias": ((log_p - log_real).mean() - ratio.mean()).item(),
        "score_error": squared(x0_fake - x_0),
        "score_noise": squared(mean[0] - mean[1]) / 4,
    }


@torch.no_grad()
def levels(game, points, centres, ts=LEVELS, seed=0):
    """at_level of every run at every level -> a list over runs of lists over ts. points, centres: `student`'s."""
    (x, c), (own, _), runs = points, centres, game.G.runs
    found = [[] for _ in range(runs)]
    for t in ts:
        t = times(torch.tensor(float(t)), x)
        x_t = add_noise(SCHEDULE, x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        level = [SCHEDULE.alpha(t[:1]).item(), SCHEDULE.sigma(t[:1]).item()]
        parts = x_t.flatten(1), own.flatten(1), log_density(x_t, t, c), game.fake(x_t, t, c).flatten(1)
        for run, values in zip(found, zip(*(by_class(part, runs) for part in parts))):
            run.append(at_level(*values, *level))
    return found


def coverage(x, c):
    """Of a run's points: the share of the modes that have at least half the points they should, the share of strays.

    A point is a mode's within 4 STD, and a stray where it is so near to none of its class.
    """
    near, mode = torch.cdist(x.flatten(1), MEANS).where(LOG_WEIGHTS[c["class"]].isfinite(), torch.inf).min(1)
    inside = torch.bincount(mode[near < 4 * STD], minlength=len(MEANS)) / (len(x) / CLASSES)
    covered = inside >= torch.tensor(WEIGHTS * CLASSES) / 2
    return covered.float().mean().item(), (near >= 4 * STD).float().mean().item()


def measured(game):
    """Everything that is measured of a finished game -> one dict per run."""
    points, centres = student(game.G, FRESH, 1), student(game.G, MEASURED, 2)
    rows = []
    for i, found in enumerate(levels(game, points, centres)):
        x, c = (v[i * MEASURED : (i + 1) * MEASURED] for v in (centres[0], centres[1]["class"]))
        c = {"class": c}
        row = {name: [level[name] for level in found] for name in found[0]}
        row["coverage"], row["strays"] = coverage(x, c)
        row["reward"], row["second_reward"] = outward(x, c).mean().item(), arrived(x, c).mean().item()
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------- the pictures

COLORS = ("#3b5bdb", "#e8590c", "#0b8f6f")  # of the classes
POINTS = 300
ARROWS = 54  # points that have one
NOISE = 300  # the t of the arrows
EDGE = 2.9  # of the axes
FRAMES = 40


def seen(game):
    """The student's points from the same noise in every call, their classes, and s_real - s_fake at some of them.

    An arrow is a mean over 64 draws of ε at t = NOISE. (POINTS, 2), (POINTS,), (ARROWS, 2).
    """
    x, c = student(game.G, POINTS, 5)
    few = x[:ARROWS].repeat_interleave(64, 0)
    eps = torch.randn(few.shape, generator=torch.Generator().manual_seed(6))
    t = torch.full((len(few),), float(NOISE))
    raises_kl, _ = dmd.score_difference(
        game.real, game.fake, few, t, eps, {"class": c["class"][:ARROWS].repeat_interleave(64)}
    )
    return x.flatten(1), c["class"], -raises_kl.view(ARROWS, 64, 2).mean(1)


def panel(ax, points, title, arrows=True, goal=False):
    """The mixture's density in every class's colour, the student's points upon it, and the arrows.

    goal: whether to mark where the reward leads.
    """
    side = torch.linspace(-EDGE, EDGE, 100)
    grid = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    for i, color in enumerate(COLORS):
        c = {"class": torch.full((len(grid),), i)}
        density = log_density(grid, torch.zeros(len(grid)), c).exp().view(100, 100).T
        for level in (0.03, 0.15, 0.5):
            ax.contourf(side, side, density, levels=[level, 9], colors=color, alpha=0.12)
    x, c, arrow = points
    ax.scatter(*x.T, s=6, c=[COLORS[i] for i in c], linewidths=0, alpha=0.85)
    if arrows:
        norm = arrow.norm(dim=1, keepdim=True).clamp(min=1e-6)
        shown = arrow / norm * (0.15 * norm).clamp(max=0.6)
        ax.quiver(*x[:ARROWS].T, *shown.T, angles="xy", scale_units="xy", scale=1, width=0.006, color="#343a40")
    if goal:
        ax.scatter(*OUTER.T, marker="*", s=110, c="white", edgecolors="#212529", linewidths=0.8, zorder=3)
    ax.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    ax.set_title(title, fontsize=9)
    for spine in ax.spines.values():
        spine.set_color("#ced4da")


def curves(axes, games):
    """KL and the score estimator's error at every noise level."""
    for title, game in games.items():
        found = levels(game, student(game.G, FRESH, 1), student(game.G, 6000, 2))[0]
        for ax, measure in zip(axes, ("kl", "score_error")):
            ax.plot(LEVELS, [level[measure] for level in found], "o-", ms=3, lw=1.2, label=title)
    for ax, name in zip(axes, ("KL(student || mixture), nats", "score estimator's squared error of ε̂")):
        ax.set(yscale="log", xlabel="noise level t")
        ax.set_title(name, fontsize=9)
        ax.grid(color="0.9", lw=0.6)
    axes[1].legend(fontsize=6.5, frameon=False)


def animate(frames, path):
    """A frame for each entry, {update: seen}; the last stays. One palette for all keeps the file small."""
    images = []
    for update, points in frames.items():
        figure, ax = plt.subplots(figsize=(4, 4.2), layout="constrained")
        panel(ax, points, f"after {update} updates of G; arrows: s_real - s_fake at t = {NOISE}")
        file = io.BytesIO()
        figure.savefig(file, dpi=90)
        plt.close(figure)
        images.append(Image.open(file).convert("RGB"))
    palette = images[0].quantize(48)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [110] * (len(small) - 1) + [2500]
    small[0].save(path, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)


def draw(runs, start):
    """Plays the runs, {title: settings}, of which the first is the standard one, and draws both pictures."""
    frames = {}

    def see(game, update):
        if update % (game.settings.updates // FRAMES) == 0:
            frames[update] = seen(game)

    (standard, base), *others = runs.items()
    games = {"undistilled": Game(start, start, base, 0), standard: play(start, base, 0, see)}
    for title, settings in others:
        games[title] = play(games[standard] if settings.rl_updates else start, settings, 0)
    figure, axes = plt.subplots(3, 4, figsize=(12, 9.6), layout="constrained")
    updates = sorted(frames)
    for ax, update in zip(axes[0], (updates[0], updates[2], updates[len(updates) // 3], updates[-1])):
        panel(ax, frames[update], f"{standard}\nafter {update} updates of G")
    for ax, (title, settings) in zip(axes.flat[4:], others):
        panel(ax, seen(games[title]), title, arrows=False, goal=settings.rl_updates)
    curves(axes[2, 2:], games)
    figure.savefig("docs/plane.png", dpi=90)
    plt.close(figure)
    animate(frames, "docs/plane.gif")
