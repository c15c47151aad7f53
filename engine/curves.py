"""The picture of doctor.py: a run's signals over the range of healthy runs, and its newest preview. No torch here."""

import math

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import NullLocator

from engine.errors import UserError
from engine.run_log import average

PANELS = {  # signal -> its panel's title, in the order of the picture; a run's picture has those that it has logged
    "score_lag": "score_lag",
    "dm_loss": "dm_loss",
    "d_accuracy": "d_accuracy",
    "d_loss_ratio": "d_loss / its value at chance",
    "saturation_ratio": "saturation / saturation_real",
    "contrast_ratio": "contrast / contrast_real",
    "latent_std_ratio": "latent_std_ratio",
    "g_norm": "g_norm",
    "diversity_ratio": "diversity / the teacher's",
    "skipped_updates": "skipped_updates",
    "kl_to_reference": "kl_to_reference",
    "kept_pairs": "kept_pairs",
    "held_out_reward": "held_out_reward",
    "held_out_prompt_accuracy": "held_out_prompt_accuracy",
    "held_out_clip_score": "held_out_clip_score",
    "rl_open": "rl_open",
}
SHARES = ("d_accuracy", "kept_pairs", "held_out_prompt_accuracy", "rl_open")  # axes from 0 to 1
EXACT = (  # no single batches: joined as they are, on linear axes; the others' are logarithmic
    *("skipped_updates", "diversity_ratio"),
    *("held_out_reward", "held_out_prompt_accuracy", "held_out_clip_score"),
)
COLUMNS, WIDTH, HEIGHT = 4, 11, 1.9  # panels in a row; inches of the picture, and of a row
DPI = 70


def draw(run, found, path):
    """Write the picture: what is found above, a panel for each signal, the newest preview below. Raises UserError."""
    panels = [signal for signal in PANELS if run.points(signal)]
    if not run.last.get("skipped_updates"):
        panels = [signal for signal in panels if signal != "skipped_updates"]
    rows = math.ceil(len(panels) / COLUMNS)
    grid = newest_preview(run.folder)
    below = 0.0 if grid is None else 0.7 * WIDTH * grid.shape[0] / grid.shape[1]
    tall = 0.45 + HEIGHT * rows + below
    figure = Figure(figsize=(WIDTH, tall), dpi=DPI)
    what = ", ".join(finding.disease for finding in found) or "nothing found"
    color = "tab:red" if found else "tab:green"
    figure.text(0.5, 1 - 0.22 / tall, f"{run.folder.name}: {what}", color=color, ha="center", parse_math=False)
    for n, signal in enumerate(panels):
        row, column = divmod(n, COLUMNS)
        place = (0.04 + column / COLUMNS, (below + HEIGHT * (rows - 1 - row) + 0.3) / tall)
        panel(figure.add_axes((*place, 0.2, 1.25 / tall)), run, signal)
    if grid is not None:
        ax = figure.add_axes((0, 0, 1, below / tall))
        ax.imshow(grid)
        ax.axis("off")
    try:
        figure.savefig(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): give another --out") from None


def newest_preview(folder):
    """The newest preview of a run, (H, W, channels); None where there is none, and where it is not written yet."""
    for path in sorted(folder.glob("preview-*.png"), reverse=True):
        try:
            return imread(path)
        except (OSError, SyntaxError, ValueError):  # Pillow's of a torn file
            continue
    return None


def panel(ax, run, signal):
    """One signal: logged values as points, the average of five (of EXACT: one) as a line, healthy runs behind."""
    total = run.config["iterations"]
    points = run.points(signal)
    loops = [p * total for p, _ in points]
    values = [v for _, v in points]
    band = run.bands.get(signal)
    if band:
        tenths = len(band["low"])
        edges = [i * total / tenths for i in range(tenths + 1)]
        ax.stairs(band["high"], edges, baseline=band["low"], fill=True, color="tab:green", alpha=0.2)
    ax.plot(loops, values, ".", color="tab:blue", markersize=4, alpha=0.5)
    n = 1 if signal in EXACT else 5
    ax.plot(loops, [average(values[max(0, i + 1 - n) : i + 1], signal) for i in range(len(values))], color="tab:blue")
    if signal in SHARES:
        ax.set_ylim(-0.02, 1.02)
    elif signal == "diversity_ratio":
        ax.set_ylim(0, max(1.2, *values))
    elif signal not in EXACT:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        steps = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        ticks = ticks[:: len(ticks) // 7 + 1]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0, 1.02 * total)
    ax.set_title(PANELS[signal], fontsize=9)
    ax.tick_params(labelsize=7)
