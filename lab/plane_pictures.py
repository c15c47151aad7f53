"""The pictures of lab.plane: docs/plane.png, a small multiple, and docs/plane.gif, points on their way."""

import io

import matplotlib.pyplot as plt
import torch
from PIL import Image

import dmd
from lab.mixture import CLASSES, FRESH, LEVELS, OUTER, Game, levels, log_density, play, student

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
    raises_kl, _ = dmd.score_difference(game.real, game.fake, few, t, eps, {"class": c["class"][:ARROWS].repeat_interleave(64)})
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
