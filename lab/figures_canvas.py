"""How the walkthrough's pictures look: rows of small pictures with labels, in one style, saved as small PNG files."""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch
from matplotlib.patheffects import withStroke
from PIL import Image

INK, SOFT = "#1f2328", "#59636e"
MADE, REAL, THIRD = "#c4462f", "#2a7a4b", "#3566b8"  # the colours of the page's symbols: fake, real, clean estimates
WIDTH = 9.0  # inches
DPI = 140
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c8ced6",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def shown(image):
    """(3, H, W) in [-1, 1] -> (H, W, 3) in [0, 1], clipped."""
    return ((image.detach().float().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


def change(before, after, gain=3.0):
    """What moved between two pictures (3, H, W), on grey: `gain` times the difference -> (3, H, W)."""
    return gain * (after - before)


def canvas(heights, left=1.35, top=0.45, bottom=0.1, gap=0.06, columns=1):
    """A figure whose rows have the given heights, in inches -> figure, [[axes of a row]].

    columns: how many square cells share the width; a row of height None is as high as a cell is wide.
    """
    plt.rcParams.update(STYLE)
    cell = (WIDTH - left - 0.1 - gap * (columns - 1)) / columns
    heights = [cell if h is None else h for h in heights]
    total = top + bottom + sum(heights) + gap * (len(heights) - 1)
    figure = plt.figure(figsize=(WIDTH, total), dpi=DPI)
    rows, y = [], total - top
    for h in heights:
        y -= h
        xs = [left + j * (cell + gap) for j in range(columns)]
        rows.append([(x / WIDTH, y / total, cell / WIDTH, h / total) for x in xs])
        y -= gap
    return figure, rows


def put(figure, box, image, title="", under="", frame=None, **how):
    """A picture (3, H, W) in a box of the canvas -> its axes. title above, under below it, frame: a colour."""
    ax = figure.add_axes(box)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=3)
    ax.imshow(shown(image) if image.dim() == 3 else image.numpy(), interpolation="nearest", **how)
    if title:
        ax.set_title(title, fontsize=8.5, pad=4)
    if under:
        ax.text(0.5, -0.04, under, transform=ax.transAxes, ha="center", va="top", fontsize=8, color=frame or SOFT)
    return ax


def label(figure, box, text):
    """A row's words, left of its first box."""
    x, y, _, h = box
    figure.text(x - 0.012, y + h / 2, text, ha="right", va="center", fontsize=8.5, linespacing=1.35)


def arrow(figure, box, to):
    """An arrow from the upper right corner of a box to the lower left one of another."""
    (x, y, w, h), (u, v, p, q) = box, to
    ends = (x + 0.82 * w, y + 0.82 * h), (u + 0.18 * p, v + 0.18 * q)
    how = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "#ffd33d", "linewidth": 2, "zorder": 10}
    outlined = [withStroke(linewidth=5, foreground=INK)]
    figure.add_artist(FancyArrowPatch(*ends, transform=figure.transFigure, path_effects=outlined, **how))


def grid(rows, columns=(), labels=(), left=1.35, under=(), top=0.45):
    """Rows of pictures (3, H, W), with column titles and row labels -> figure, boxes. under: words below each row."""
    n = max(map(len, rows))
    deep = 0.2 if under else 0.06
    figure, boxes = canvas([None] * len(rows), left=left, top=top, gap=deep, columns=n, bottom=0.22 if under else 0.1)
    for i, row in enumerate(rows):
        if labels:
            label(figure, boxes[i][0], labels[i])
        for j, image in enumerate(row):
            if image is not None:
                words = under[i][j] if under else ""
                put(figure, boxes[i][j], image, columns[j] if columns and i == 0 else "", words)
    return figure, boxes


def save(figure, path):
    """Write a figure as a PNG of 256 colours: a third of the size, and no difference to the eye."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI)
    plt.close(figure)
    picture = Image.open(memory).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def smooth(values, window=5):
    """A running mean over the last `window` values."""
    values = np.asarray(values, float)
    return np.array([values[max(0, i - window + 1) : i + 1].mean() for i in range(len(values))])
