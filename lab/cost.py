"""Quality against training cost (Table 1, Fig. 5): Flash-DMD at TTUR 1, 2, 5 beside DMD2 at TTUR 5 and 2, and the paper's headline.

    python -m lab.cost              what is missing in results/cost.json; then the table, the headline and docs/cost.png
    python -m lab.cost --print      from what is there

Every run is evaluated at five points of its way. Cost is what the paper counts, batch x iterations; passes of the three UNets are counted too.
The headline: the share of DMD2's cost, up to its best point, at which Flash-DMD first does as well.
"""

import json
import shutil
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from lab import rows
from lab.stage1 import FULL, SEEDS

RESULTS = Path("results/cost.json")
POINTS = 5
BASELINE = "DMD2, TTUR 5"
METHODS = {
    "Flash-DMD, TTUR 1": FULL,
    "Flash-DMD, TTUR 2": FULL | {"--ttur": 2, "--iterations": 800},
    "Flash-DMD, TTUR 5": FULL | {"--ttur": 5, "--iterations": 2000},
    BASELINE: {"--preset": "dmd2", "--iterations": 2000},
    "DMD2, TTUR 2": {"--preset": "dmd2", "--iterations": 2000, "--ttur": 2},
}  # title -> flags of its runs, one for each of SEEDS
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "saturation", "contrast")


def name(flags, seed, num):
    return rows.key(flags, "--seed", seed, f"{num} prompts, {POINTS} points")


def measure(flags, seed, num, threads):
    """One run -> its metrics at POINTS points, each with samples, passes and seconds so far. Interrupted, it goes on from its last checkpoint."""
    points = run(flags, rows.folder(name(flags, seed, num)), seed, num, threads)
    shutil.rmtree(rows.folder(name(flags, seed, num)))
    return points


def run(flags, out, seed, num, threads):
    """The same, in folder `out`, which stays."""
    every = flags["--iterations"] // POINTS
    settings = {"--out": out, "--resume": True, "--save-every": every, "--keep": POINTS, "--preview-every": 0, "--seed": seed}
    rows.command("train.py", "--stage", 1, *rows.flat(flags | settings), threads=threads)
    points = []
    for loops in range(every, flags["--iterations"] + 1, every):
        path = out / f"metrics-{loops}.json"
        if not path.exists():
            rows.command("evaluate.py", "--run", out, "--loops", loops, "--num", num, "--json", path, threads=threads)
        progress = json.loads((out / f"checkpoint-{loops:06d}" / "progress.json").read_text())
        points.append(json.loads(path.read_text()) | {k: progress[k] for k in ("loops", "samples", "passes", "seconds")})
    return points


def share(flash, baseline, measure, sign, cost="samples"):
    """The share of the baseline's cost, up to its best point, at which `flash` first does as well. -> (share, reached)

    flash, baseline: points of two runs; sign -1: smaller is better. Never reached: the share of all of flash's cost, a lower bound.
    """
    best = max(baseline, key=lambda p: sign * p[measure])
    first = next((p for p in flash if sign * p[measure] >= sign * best[measure]), None)
    return (first or flash[-1])[cost] / best[cost], first is not None


def headline(found):
    """Lines: per measure and Flash-DMD's TTUR the share over seeds. found: {method: {seed: points}}."""
    lines = []
    for title in METHODS:
        seeds = [s for s in found.get(title, {}) if s in found.get(BASELINE, {})]
        if title.startswith("Flash") and seeds:
            for measure_, sign in (("frechet", -1), ("prompt_accuracy", 1)):
                shares = [share(found[title][s], found[BASELINE][s], measure_, sign) for s in seeds]
                shown = ", ".join(f"{'' if reached else 'more than '}{100 * value:.0f} %" for value, reached in shares)
                lines.append(f"{title} does as well as the best point of {BASELINE} in {rows.HEADINGS[measure_]} at {shown} of its cost")
    return lines


def found_of(methods, results, num):
    """{title: {seed: points}} of the rows that are there."""
    found = {t: {s: results[n] for s in SEEDS if (n := name(f, s, num)) in results} for t, f in methods.items()}
    return {title: seeds for title, seeds in found.items() if seeds}


def table(heading, found, columns):
    rows.head(heading, columns)
    for title, seeds in found.items():
        for points in zip(*seeds.values()):
            rows.line(f"{title}, {points[0]['loops']} loops", points, columns)


def plot(found, path="docs/cost.png"):
    """Both measures over cost: each seed thin, the mean of those that are there thick."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, (title, seeds) in zip(plt.cm.tab10.colors, found.items()):
        for ax, measure_, scale in zip(axes, ("frechet", "prompt_accuracy"), (1, 100)):
            for points in seeds.values():
                ax.plot([p["samples"] for p in points], [scale * p[measure_] for p in points], color=color, lw=0.7, alpha=0.5)
            both = list(zip(*seeds.values()))
            ax.plot([p[0]["samples"] for p in both], [scale * mean(q[measure_] for q in p) for p in both], ".-", color=color, lw=2, label=title)
            ax.set(xscale="log", xlabel="training samples (batch x loops)", title=rows.HEADINGS[measure_])
            ax.set_xticks([1000, 3000, 10000, 30000], ["1,000", "3,000", "10,000", "30,000"])
            ax.set_xticks([], minor=True)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    results = rows.load(RESULTS)
    if not args.print:
        chosen = [(METHODS[title], seed) for seed in SEEDS for title in args.only]
        jobs = {name(f, s, args.num): lambda threads, f=f, s=s: measure(f, s, args.num, threads) for f, s in chosen}
        rows.fill(RESULTS, results, jobs, args.jobs)
    found = found_of(METHODS, results, args.num)
    table("Table 1, Fig. 5", found, COLUMNS)
    print("\n" + "\n".join(headline(found)))
    plot(found)


if __name__ == "__main__":
    main()
