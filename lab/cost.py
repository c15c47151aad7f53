"""Quality against training cost (Table 1, Fig. 5): Flash-DMD at TTUR 1, 2, 5 beside DMD2 at TTUR 5 and 2 and tuned, and the paper's headline.

    python -m lab.cost              what is missing in results/cost.json; then the table, the headline and docs/cost.png
    python -m lab.cost --print      from what is there

Every run is evaluated at five points of its way. Cost is what the paper counts, batch x iterations; passes of the three UNets are counted too.
The headline: the share of DMD2's cost, up to its best point, at which Flash-DMD first does as well in Fréchet distance, prompts right, or both.
"""

import json
import shutil
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from lab import rows
from lab.stage1 import DMD2, FULL, SEEDS

RESULTS = Path("results/cost.json")
POINTS = 5
BASELINE, TUNED = "DMD2, TTUR 5", "DMD2 tuned, TTUR 5"  # tuned: with the rates that lab.stage1's "dmd2-sweep" chose
METHODS = {
    "Flash-DMD, TTUR 1": FULL,
    "Flash-DMD, TTUR 2": FULL | {"--ttur": 2, "--iterations": 800},
    "Flash-DMD, TTUR 5": FULL | {"--ttur": 5, "--iterations": 2000},
    BASELINE: DMD2,
    "DMD2, TTUR 2": DMD2 | {"--ttur": 2},
    TUNED: DMD2 | {"--lr": 1e-4, "--fake-lr": 4e-4},
}  # title -> flags of its runs, one for each of SEEDS
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast")


def name(flags, seed, num):
    return rows.key(flags, "--seed", seed, f"{num} prompts, {POINTS} points")


def measure(flags, seed, num, threads):
    """One run -> its metrics at POINTS points, each with samples, passes and seconds so far. Interrupted, it goes on from its last checkpoint."""
    points = run(flags, rows.folder(name(flags, seed, num)), seed, num, threads)
    shutil.rmtree(rows.folder(name(flags, seed, num)))
    return points


def run(flags, out, seed, num, threads):
    """The same, in folder `out`, which stays. A run that was stopped has checkpoints beside those of the points: hence twice as many are kept."""
    every = flags["--iterations"] // POINTS
    settings = {"--out": out, "--resume": True, "--save-every": every, "--keep": 2 * POINTS, "--preview-every": 0, "--seed": seed}
    rows.command("train.py", "--stage", 1, *rows.flat(flags | settings), threads=threads)
    points, logged = [], [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for loops in range(every, flags["--iterations"] + 1, every):
        path = out / f"metrics-{loops}.json"
        if not path.exists():
            rows.command("evaluate.py", "--run", out, "--loops", loops, "--num", num, "--json", path, threads=threads)
        progress = json.loads((out / f"checkpoint-{loops:06d}" / "progress.json").read_text())
        points.append(json.loads(path.read_text()) | {k: progress[k] for k in ("loops", "samples", "passes", "seconds")})
        if opened := [m["rl_open"] for m in logged if m["loops"] <= loops and "rl_open" in m]:  # AdvDMD
            points[-1]["rl_open"] = mean(opened)
    return points


def share(flash, baseline, measures, cost="samples"):
    """The share of the baseline's cost, up to its best point, at which `flash` first does as well. -> (share, reached)

    flash, baseline: points of two runs. measures: {name: sign}, sign -1: smaller is better; of several each has a best point of its own,
    the cost goes up to the last of them, and `flash` must match all at once. Never reached: the share of all of flash's cost, a lower bound.
    """
    best = best_points(baseline, measures)
    first = next((p for p in flash if all(sign * p[m] >= sign * best[m][m] for m, sign in measures.items())), None)
    return (first or flash[-1])[cost] / max(p[cost] for p in best.values()), first is not None


def best_points(points, measures):
    """{measure: the point of a run that is best in it}"""
    return {m: max(points, key=lambda p: sign * p[m]) for m, sign in measures.items()}


def percent(flash, baseline, measures, cost):
    """`share` in percent as the table has it; "?" where a run was paused, so that its seconds were struck out (null in results/cost.json)."""
    if None in (flash[-1][cost], baseline[-1][cost]):
        return "?"
    value, reached = share(flash, baseline, measures, cost)
    return f"{'' if reached else '> '}{100 * value:.0f}"


def headline(found, against=BASELINE):
    """Lines of Markdown: the share for each of Flash-DMD's TTURs, criterion and kind of cost, seed by seed. found: {method: {seed: points}}."""
    costs, both, baseline = ("samples", "passes", "seconds"), {"frechet": -1, "prompt_accuracy": 1}, found.get(against, {})
    called = {"frechet": "Fréchet", "prompt_accuracy": "prompts right"}
    criteria = {called[m]: {m: sign} for m, sign in both.items()} | {"both at once": both}
    lines = [f"| share of {against}'s cost | as good in | " + " | ".join(costs) + " |", "| --- | --- |" + " --- |" * len(costs)]
    for title, runs in found.items():
        seeds = [s for s in runs if s in baseline]
        for criterion, measures in criteria.items() if title.startswith("Flash") and seeds else ():
            shown = [", ".join(percent(runs[s], baseline[s], measures, cost) for s in seeds) + " %" for cost in costs]
            lines.append(f"| {title}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} | {criterion} | " + " | ".join(shown) + " |")
    lines += ["", f"\\>: not so good within its whole run, a lower bound; the others are upper bounds, for a run is looked at {POINTS} times."]
    last = [f"{called[m]} (seed {s})" for s, run in baseline.items() for m, p in best_points(run, both).items() if p is run[-1]]
    return lines + [f"{against} is best at its very end, and might go on, in {'; '.join(last)}: that share is of this horizon alone."] * bool(last)


def found_of(methods, results, num):
    """{title: {seed: points}} of the rows that are there."""
    found = {t: {s: results[n] for s in SEEDS if (n := name(f, s, num)) in results} for t, f in methods.items()}
    return {title: seeds for title, seeds in found.items() if seeds}


def table(heading, found, columns):
    rows.head(heading, columns)
    for title, seeds in found.items():
        for points in zip(*seeds.values()):
            rows.line(f"{title}, {points[0]['loops']} loops", points, columns)


def plot(found, path, measures=("frechet", "prompt_accuracy")):
    """Two measures a row over cost: each seed thin, the mean of those that are there thick."""
    high = len(measures) // 2
    figure, axes = plt.subplots(high, 2, figsize=(10, 0.6 + 3.2 * high), layout="constrained", squeeze=False)
    for color, (title, seeds) in zip(plt.cm.tab10.colors, found.items()):
        for ax, measure_ in zip(axes.flat, measures):
            scale = 100 if measure_ in rows.PERCENT else 1
            for points in seeds.values():
                ax.plot([p["samples"] for p in points], [scale * p[measure_] for p in points], color=color, lw=0.7, alpha=0.5)
            both = list(zip(*seeds.values()))
            ax.plot([p[0]["samples"] for p in both], [scale * mean(q[measure_] for q in p) for p in both], ".-", color=color, lw=2, label=title)
            ax.set(xscale="log", xlabel="training samples (batch x loops)", title=rows.HEADINGS[measure_])
            ax.set_xticks([1000, 3000, 10000, 30000], ["1,000", "3,000", "10,000", "30,000"])
            ax.set_xticks([], minor=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def train(titles, num, workers):
    """What is missing of these methods."""
    chosen = [(METHODS[title], seed) for seed in SEEDS for title in titles]
    jobs = {name(f, s, num): lambda threads, f=f, s=s: measure(f, s, num, threads) for f, s in chosen}
    rows.fill(RESULTS, rows.load_rewarded(RESULTS), jobs, workers)


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    if not args.print:
        train(args.only, args.num, args.jobs)
    found = found_of(METHODS, rows.load_rewarded(RESULTS), args.num)
    table("Table 1, Fig. 5", found, COLUMNS)
    for against in (BASELINE, TUNED):
        print("\n" + "\n".join(headline(found, against)))
    plot(found, rows.place("docs/cost.png", args.num))


if __name__ == "__main__":
    main()
