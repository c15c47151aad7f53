"""Quality against training cost (Table 1, Fig. 5): Flash-DMD at TTUR 1, 2 and 5 beside DMD2 at TTUR 5 and 2 and tuned.

    python -m lab.cost              the missing rows of results/cost.json, then results/cost.md and docs/cost.png
    python -m lab.cost --print      page and plot from the rows that are there

Every run is evaluated at five points of its way. Cost is what the paper counts, batch x iterations; passes of the three
UNets are counted too. The headline is the share of DMD2's cost, up to its best point, at which Flash-DMD first does as
well in Fréchet distance, prompts right, or both.
"""

import json
import shutil
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from lab import pages, rows, stage1
from lab.pages import errors, figure, frechet, right
from lab.rows import SEEDS
from lab.stage1 import DMD2, FULL
from lab.verdicts import at_best

RESULTS = Path("results/cost.json")
POINTS = 5
TTUR1, TTUR2, TTUR5 = (f"Flash-DMD, TTUR {n}" for n in (1, 2, 5))
BASELINE = "DMD2, TTUR 5"
DMD2_TTUR2 = "DMD2, TTUR 2"
TUNED = "DMD2 tuned, TTUR 5"  # with the rates that lab.stage1's "dmd2-sweep" chose
METHODS = {
    TTUR1: FULL,
    TTUR2: FULL | {"--ttur": 2, "--iterations": 800},
    TTUR5: FULL | {"--ttur": 5, "--iterations": 2000},
    BASELINE: DMD2,
    DMD2_TTUR2: DMD2 | {"--ttur": 2},
    TUNED: DMD2 | {"--lr": 1e-4, "--fake-lr": 4e-4},
}  # title -> flags of its runs, one for each of SEEDS
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast")
BOTH = {"frechet": -1, "prompt_accuracy": 1}  # measure -> sign; -1: smaller is better
CALLED = {"frechet": "Fréchet", "prompt_accuracy": "prompts right"}


def name(flags, seed, num):
    return rows.key(flags, "--seed", seed, f"{num} prompts, {POINTS} points")


def measure(flags, seed, num, threads):
    """One run -> its metrics at POINTS points, each with samples, passes and seconds so far.

    Interrupted, it goes on from its last checkpoint.
    """
    out = rows.folder(name(flags, seed, num))
    points = run(flags, out, seed, num, threads)
    shutil.rmtree(out)
    return points


def run(flags, out, seed, num, threads):
    """The same, in folder `out`, which stays.

    A run that was stopped has checkpoints beside those of the points: hence twice as many are kept.
    """
    every = flags["--iterations"] // POINTS
    kept = {"--save-every": every, "--keep": 2 * POINTS, "--preview-every": 0}
    settings = {"--stage": 1, "--out": out, "--resume": True, "--seed": seed, **kept}
    rows.command("train.py", *rows.flat(settings), *rows.flat(flags), threads=threads)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    points = []
    for loops in range(every, flags["--iterations"] + 1, every):
        path = out / f"metrics-{loops}.json"
        if not path.exists():
            argv = ("--run", out, "--loops", loops, "--num", num, "--json", path)
            rows.command("evaluate.py", *argv, threads=threads)
        progress = json.loads((out / f"checkpoint-{loops:06d}" / "progress.json").read_text())
        point = json.loads(path.read_text())
        point |= {k: progress[k] for k in ("loops", "samples", "passes", "seconds")}
        if opened := [m["rl_open"] for m in logged if m["loops"] <= loops and "rl_open" in m]:  # AdvDMD
            point["rl_open"] = mean(opened)
        points.append(point)
    return points


def share(flash, baseline, measures, cost="samples"):
    """The share of the baseline's cost, up to its best point, at which `flash` first does as well. -> (share, reached)

    flash, baseline: points of two runs. measures: {name: sign}, sign -1: smaller is better. Of several measures each
    has a best point of its own, the cost goes up to the last of them, and `flash` must match all at once. Never
    reached: the share of all of flash's cost, a lower bound.
    """
    best = best_points(baseline, measures)

    def as_good(point):
        return all(sign * point[m] >= sign * best[m][m] for m, sign in measures.items())

    first = next(filter(as_good, flash), None)
    return (first or flash[-1])[cost] / max(p[cost] for p in best.values()), first is not None


def best_points(points, measures):
    """{measure: the point of a run that is best in it}"""
    return {m: max(points, key=lambda p: sign * p[m]) for m, sign in measures.items()}


def percent(flash, baseline, measures, cost):
    """`share` in percent as the table has it; "?" where a run was paused: its seconds are null in results/cost.json."""
    if None in (flash[-1][cost], baseline[-1][cost]):
        return "?"
    value, reached = share(flash, baseline, measures, cost)
    return f"{'' if reached else '> '}{100 * value:.0f}"


def headline(found, against=BASELINE):
    """The share for each of Flash-DMD's TTURs, criterion and kind of cost, seed by seed, in lines of Markdown.

    found: {method: {seed: points}}.
    """
    costs = ("samples", "passes", "seconds")
    baseline = found.get(against, {})
    criteria = {CALLED[m]: {m: sign} for m, sign in BOTH.items()}
    criteria["both at once"] = BOTH
    lines = [f"| share of {against}'s cost | as good in | " + " | ".join(costs) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(costs))
    for title, runs in found.items():
        seeds = [s for s in runs if s in baseline]
        if not seeds or not title.startswith("Flash"):
            continue
        named = f"{title}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        for criterion, measures in criteria.items():
            cells = []
            for cost in costs:
                cells.append(", ".join(percent(runs[s], baseline[s], measures, cost) for s in seeds) + " %")
            lines.append(f"| {named} | {criterion} | " + " | ".join(cells) + " |")
    return lines + ["", LOWER_BOUND.format(points=POINTS), *best_at_the_end(against, baseline)]


LOWER_BOUND = (
    "\\>: not so good within its whole run, a lower bound; the others are upper bounds, "
    "for a run is looked at {points} times."
)


def best_at_the_end(against, baseline):
    """A line that names where the baseline is best at its last point, if anywhere. baseline: {seed: points}."""
    ends = []
    for seed, run in baseline.items():
        ends += [f"{CALLED[m]} (seed {seed})" for m, point in best_points(run, BOTH).items() if point is run[-1]]
    if not ends:
        return []
    where = "; ".join(ends)
    return [f"{against} is best at its very end, and might go on, in {where}: that share is of this horizon alone."]


def found_of(methods, results, num):
    """{title: {seed: points}} of the rows that are there."""
    found = {}
    for title, flags in methods.items():
        if seeds := {s: results[n] for s in SEEDS if (n := name(flags, s, num)) in results}:
            found[title] = seeds
    return found


def ends_of(found):
    """{title: the last point of each seed}"""
    return {title: [points[-1] for points in seeds.values()] for title, seeds in found.items()}


def table(heading, found, columns):
    """A line for each method, at its last point."""
    lines = pages.head(heading, columns)
    for title, ends in ends_of(found).items():
        lines.append(pages.line(f"{title}, {ends[0]['loops']} loops", ends, columns))
    return lines


def plot(found, path, measures=("frechet", "prompt_accuracy")):
    """Two measures a row over cost: each seed thin, the mean of those that are there thick."""
    high = len(measures) // 2
    figure, axes = plt.subplots(high, 2, figsize=(10, 0.6 + 3.2 * high), layout="constrained", squeeze=False)
    for color, (title, seeds) in zip(plt.cm.tab10.colors, found.items()):
        points = list(zip(*seeds.values()))
        samples = [p[0]["samples"] for p in points]
        for ax, measure_ in zip(axes.flat, measures):
            scale = 100 if measure_ in pages.PERCENT else 1
            for run in seeds.values():
                values = [scale * p[measure_] for p in run]
                ax.plot([p["samples"] for p in run], values, color=color, lw=0.7, alpha=0.5)
            means = [scale * mean(p[measure_] for p in of_seeds) for of_seeds in points]
            ax.plot(samples, means, ".-", color=color, lw=2, label=title)
            ax.set(xscale="log", xlabel="training samples (batch x loops)", title=pages.HEADINGS[measure_])
            ax.set_xticks([1000, 3000, 10000, 30000], ["1,000", "3,000", "10,000", "30,000"])
            ax.set_xticks([], minor=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def train(titles, num, workers):
    """What is missing of these methods."""
    jobs = {}
    for seed in SEEDS:
        for flags in (METHODS[title] for title in titles):
            jobs[name(flags, seed, num)] = lambda threads, f=flags, s=seed: measure(f, s, num, threads)
    rows.fill(RESULTS, rows.load_rewarded(RESULTS), jobs, workers)


def page(num=rows.NUM):
    """results/cost.md, from the rows that are there."""
    found = found_of(METHODS, rows.load_rewarded(RESULTS), num)
    ends = ends_of(found)
    first = rows.load(stage1.RESULTS)
    return pages.joined(
        [
            INTRODUCTION,
            headline(found),
            headline(found, TUNED),
            pages.told(headline_text, found, ends),
            "## At the end of the runs",
            "![Fréchet distance and prompts right over training cost](../docs/cost.png)",
            table("at the last point", found, COLUMNS),
            pages.told(ends_text, found, ends, stage1.rows_of("main", first, num)),
            "## DMD2's own sweep",
            stage1.table("dmd2-sweep", first, num, "DMD2, seed 0, 800 loops"),
            pages.told(tuned_text, found, ends),
            SAME_PROMPTS,
        ]
    )


INTRODUCTION = """
# Quality against training cost

`python -m lab.cost` trains the rows that are missing in [cost.json](cost.json), and writes this page and its plot;
`--print` writes them from the rows that are there.

Flash-DMD at TTUR 1, 2 and 5 (400 updates of G each) stands beside DMD2: DM loss at every step, latent GAN, TTUR 5, no
EMA pull (`--preset dmd2`). DMD2 also has rows at TTUR 2, and tuned, with the rates that a sweep of its own chose (last
table). Every run is evaluated at five points of its way. The paper counts cost as batch x loops.

## The headline

The share of DMD2's cost, up to its best point within 2,000 loops (32,000 samples), at which Flash-DMD first does as
well. The paper has 2.1 %. "?": a run was paused, so its seconds do not count.
"""


def reached(found, title, against, measure_):
    """The shares of the seeds with which a method does as well within its run, in percent, and those seeds."""
    shares = {s: share(run, found[against][s], {measure_: BOTH[measure_]}) for s, run in found[title].items()}
    seeds = [s for s, (_, done) in shares.items() if done]
    return ", ".join(f"{100 * shares[s][0]:.0f}" for s in seeds), seeds


def headline_text(found, ends):
    flash, dmd2 = ends[TTUR1], ends[BASELINE]
    near, near_seeds = reached(found, TTUR1, BASELINE, "frechet")
    correct, correct_seeds = reached(found, TTUR1, BASELINE, "prompt_accuracy")
    tuned_near, tuned_near_seeds = reached(found, TTUR1, TUNED, "frechet")
    tuned_correct, tuned_correct_seeds = reached(found, TTUR1, TUNED, "prompt_accuracy")
    short = []
    for seed in (s for s in found[TTUR1] if s not in correct_seeds):
        best = best_points(found[BASELINE][seed], BOTH)["prompt_accuracy"]
        short.append(f"{right([found[TTUR1][seed][-1]])} % for {right([best])} %")
    lucky = best_points(found[BASELINE][2], BOTH)["frechet"]
    crossing = best_points(found[TTUR1][0], BOTH)["frechet"]
    return f"""
**That a fiftieth of the cost is enough is not seen here.** A fifth comes to the same at the ends: Flash-DMD at TTUR 1
has {right(flash)} % of the prompts right and a Fréchet distance of {frechet(flash)}, DMD2 after five times the samples
{right(dmd2)} % ({errors(flash, dmd2, "prompt_accuracy")}) and {frechet(dmd2)} ({errors(flash, dmd2, "frechet")}).

- At TTUR 1, beside DMD2 as it is: in Fréchet distance {len(near_seeds)} of {len(found[TTUR1])} seeds do as well, at
  {near} % of the cost. Seed 2 does not in its whole run: its DMD2 has its best point, {lucky["frechet"]:.2f}, at
  {lucky["loops"]} loops, and is never so near again. In prompts right {len(correct_seeds)} does as well, at
  {correct} %. The others do not in their whole runs, and end at {" and ".join(short)}.
- At TTUR 1, beside DMD2 tuned: {len(tuned_near_seeds)} seeds at {tuned_near} % in Fréchet distance,
  {len(tuned_correct_seeds)} at {tuned_correct} % in prompts right.
- At TTUR 2 and 5 Flash-DMD takes longer to the same marks. One that TTUR 1 missed, prompts right with seed 0, is
  reached at TTUR 5, at {percent(found[TTUR5][0], found[BASELINE][0], {"prompt_accuracy": 1}, "samples")} %.

How to read these shares: the best of five noisy points flatters DMD2, and the first crossing among five flatters
Flash-DMD. Seed 0 passes both of its marks in Fréchet distance at {crossing["loops"]} loops alone
({crossing["frechet"]:.2f}), and ends at {found[TTUR1][0][-1]["frechet"]:.2f}. Rates fall to 0 over each run's own
loops, so points on the way are of runs whose rates are still high. A loop of DMD2 is cheaper, for four of five move no
generator. The passes are those of the UNets alone; Pixel-GAN's VAE and SAM are in the seconds, which were measured on
cores shared with other runs.
"""


def ends_text(found, ends, first):
    one, two, five = ends[TTUR1], ends[TTUR2], ends[TTUR5]
    dmd2, unsteady, tuned = ends[BASELINE], ends[DMD2_TTUR2], ends[TUNED]
    best = mean(at_best([[p["frechet"] for p in run] for run in found[DMD2_TTUR2].values()], -1))
    real = one[0]["real"]["saturation"]
    return f"""
The mean over seeds stands first, each seed's value behind it. The reward is that of `toy/lrm`, which stage 1 never
sees. "Prompts right" is the exact check of a picture against its prompt.

- **From TTUR 2 on Flash-DMD has more reward than DMD2.** At TTUR 2, with two fifths of DMD2's samples, it has
  {figure(two, "reward")} for {figure(dmd2, "reward")} ({errors(two, dmd2, "reward")}), and a Fréchet distance of
  {frechet(two)} for {frechet(dmd2)} ({errors(two, dmd2, "frechet")}). At TTUR 5, with as many samples, both are better:
  {figure(five, "reward")} ({errors(five, dmd2, "reward")}) and {frechet(five)} ({errors(five, dmd2, "frechet")}).
- **TTUR 2 beats TTUR 1**, after twice the samples, in reward ({errors(two, one, "reward")}) and in Fréchet distance
  ({errors(two, one, "frechet")}). The paper's TTUR 2 does so after eight times as many. TTUR 5 has more reward than
  TTUR 1 too ({errors(five, one, "reward")}), where the paper has a little less.
- **That DMD2 is unstable at TTUR 2 (Fig. 5) is not seen.** Its Fréchet distance is {best:.2f} at the best point before
  the last, {frechet(unsteady)} at the last, and {frechet(dmd2)} at TTUR 5. Flash-DMD has
  {frechet(two)} at TTUR 2 ({errors(two, unsteady, "frechet")}); DMD2's seeds differ by more
  ({pages.each(unsteady, "frechet")}). A guess: rates that suit Flash-DMD at TTUR 1, and fall to 0, keep DMD2 steady
  too.
- With more loops all overshoot the real scenes' saturation ({real:.3f}): Flash-DMD has
  {", ".join(figure(side, "saturation") for side in (one, two, five))} at TTUR 1, 2 and 5, DMD2
  {figure(dmd2, "saturation")}, at TTUR 2 {figure(unsteady, "saturation")}, and tuned {figure(tuned, "saturation")}.

These runs had one thread each, those of [stage1.md](stage1.md) two, so that sums are in another order: seed 0 of
Flash-DMD at TTUR 1 ends at {right(one[:1])} % here, and at {right(first[stage1.FLASH][:1])} % there.
"""


def tuned_text(found, ends):
    two, dmd2, tuned = ends[TTUR2], ends[BASELINE], ends[TUNED]
    means = {p[0]["loops"]: mean(q["frechet"] for q in p) for p in zip(*found[TUNED].values())}
    loops = min(means, key=means.get)
    return f"""
In the rows above, DMD2's rates are Flash-DMD's, and its two GAN weights DMD2's own. This sweep has as many runs as
Flash-DMD's ([stage1.md](stage1.md)), seven beside the default, but shorter ones: two fifths of DMD2's loops, where
Flash-DMD's are whole (`python -m lab.stage1 --only dmd2-sweep`). The rule, fixed when only the first row was there: of
the settings that beat the default in both Fréchet distance and prompts right, take the one with the best Fréchet
distance. That is {stage1.CHOSEN}, **DMD2 tuned**.

Over 2,000 loops the choice does not pay: a recall of {figure(tuned, "recall")} for {figure(dmd2, "recall")} %
({errors(tuned, dmd2, "recall")}), a Fréchet distance of {frechet(tuned)} for {frechet(dmd2)}
({errors(tuned, dmd2, "frechet")}), and {right(tuned)} % of the prompts right for {right(dmd2)} %
({errors(tuned, dmd2, "prompt_accuracy")}). Its best Fréchet distance, {means[loops]:.2f}, is at {loops} loops. A
guess: the sweep was too short, or with one seed too noisy, to show that. So DMD2 as it is stays the baseline
of the headline.
One claim rests on the choice of the baseline: Flash-DMD's Fréchet distance at TTUR 2, beside DMD2 tuned
({errors(two, tuned, "frechet")}) or beside DMD2 ({errors(two, dmd2, "frechet")}).

No rows are there of the constant rate, which has the most prompts right in the sweep, over 2,000 loops, nor of TTUR 2
with rates of its own.
"""


SAME_PROMPTS = """
## The same prompts at equal cost

`python -m lab.grids` draws the same 24 prompts from the same noise: the teacher, and three students after 6,400 samples
each (DMD2 as it is; of stage 2's samples 3,200 are stage 1's). The titles count the prompts that are right. With 24
prompts this is no more than a look.

![the teacher, DMD2, Flash-DMD's stage 1 and its stage 2](../docs/grids.png)
"""


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    if not args.print:
        train(args.only, args.num, args.jobs)
    write(args.num)


def write(num):
    """The page and its plot."""
    pages.write("results/cost.md", num, page(num))
    plot(found_of(METHODS, rows.load_rewarded(RESULTS), num), rows.place("docs/cost.png", num))


if __name__ == "__main__":
    main()
