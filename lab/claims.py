"""The claims of lab/paper.py, assessed on the toy world: runs every row that they need, and writes every page.

    python -m lab.claims                    the rows that are missing, then results/*.md and docs/*.png; many hours
    python -m lab.claims --only table4      one part: its rows, its page, its plot
    python -m lab.claims --only verdicts    results/claims.md, verdicts.json, docs/claims.png, from the rows there are
    python -m lab.claims --quick            the core rows in minutes: one seed, 100 loops, 200 prompts
    python -m lab.claims --print            every page and plot; trains nothing

Rows are cached by their flags, so an interrupted call goes on. Parts are named after lab/'s modules, and after the two
tables of results/stage2.md.
"""

import json
import re
from collections import Counter
from statistics import mean

import matplotlib.pyplot as plt

from lab import cost, pages, rows, siblings, stage1, stage2, variation
from lab.paper import CLAIMS, DMD2, FLASH
from lab.rows import SEEDS
from lab.stage1 import FULL
from lab.stage2 import ALONE, JOINTLY, STAGE1
from lab.verdicts import at_best, verdict

TRAIN = {  # part -> what runs its missing rows: (num, workers)
    "stage1": lambda *n: stage1.train(("main", "variants", "students", "sd3"), *n),
    "cost": lambda *n: cost.train(cost.METHODS, *n),
    "siblings": lambda *n: siblings.train(siblings.METHODS, *n),
    "variation": lambda num, workers: variation.train(num),
    "table4": lambda *n: stage2.train("table4", *n),
    "table7": lambda *n: stage2.train("table7", *n),
}
METHODS = cost.METHODS | siblings.METHODS


def values(measured, title, measure, sign, point, num):
    """A measure of a row, seed by seed. No training seed is in the teacher's value: it counts as three equal ones.

    The noise of the prompts is on both sides, and in no error: all rows draw the same ones.
    """
    if flags := METHODS.get(title):
        names = [cost.name(flags, s, num) for s in SEEDS]
        runs = [[p[measure] for p in measured[n]] for n in names if n in measured]
        return at_best(runs, sign) if point == "best" else [run[point] for run in runs]
    if title in variation.TITLES:
        names = [variation.name(s) for s in SEEDS]
        return [measured[n][title] for n in names if n in measured]
    return [measured[n][measure] for n in names_of(title, num) if n in measured]


def names_of(title, num):
    """The names of a row of stage 1, of stage 2, or of a baseline, seed by seed."""
    if title in stage1.BASELINES | stage1.SD3_BASELINES:
        return [stage1.baseline_name(title, num)] * len(SEEDS)
    if title == STAGE1:
        return [stage2.start(FULL, s, num) for s in SEEDS]
    if flags := (stage2.TABLE4 | stage2.TABLE7).get(title):
        return [stage2.name(flags, s, num) for s in SEEDS]
    table = next(table for table in stage1.TABLES.values() if title in table)
    flags, seeds = table[title]
    return [stage1.name(flags, s, num) for s in seeds]


def assess(measured, num):
    """-> for each of CLAIMS (claim, values of the better side, of the worse, gain, error, verdict).

    Gain and error are None, and the verdict "not run", where a side has no row.
    """
    assessed = []
    for claim in CLAIMS:
        sides = []
        for title, point in zip((claim.better, claim.worse), claim.points):
            sides.append(values(measured, title, claim.measure, claim.sign(), point, num))
        decided = verdict(*sides, claim.sign()) if all(sides) else (None, None, "not run")
        assessed.append((claim, *sides, *decided))
    return assessed


def side(title, point):
    """A row's title as the table shows it, with its point where that is not the last."""
    if point == -1:
        return title
    return f"{title}, best point" if point == "best" else f"{title}, point {point + 1} of {cost.POINTS}"


def table(assessed):
    """Every claim with both sides, their difference and its verdict, in lines of Markdown."""
    columns = ("claim", "source", "there (better, worse)", "measure here")
    columns += ("claimed better", "claimed worse", "difference", "verdict")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --- |" * (len(columns) - 1)]
    for claim, better, worse, gain, error, decided in assessed:
        shown = []
        for title, point, found in zip((claim.better, claim.worse), claim.points, (better, worse)):
            shown.append(side(title, point) + (f": {mean(found):.4f}" if found else ""))
        difference = "" if gain is None else f"{gain:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        cells = (claim.text + "†" * claim.late, claim.source, claim.paper, claim.measure, *shown, difference, decided)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def reasons(assessed):
    """A list of the claims that do not hold, with the guesses why."""
    lines = []
    for claim, *_, decided in assessed:
        if decided == "does not hold":
            reason = " ".join(claim.reason.split()) or "No reason is known yet."
            lines.append(f"- {claim.text} ({claim.source}, {claim.measure}). {reason}")
    return lines


def hours(*files):
    """A sentence: the training time of all rows that recorded it. Rows of stage 1 have seconds a loop, others a sum."""
    spans = {}
    for row, measured in (entry for file in files for entry in file.items() if "--iterations" in entry[0]):
        loops = int(re.search(r"--iterations (\d+)", row)[1])
        if isinstance(measured, list):
            seconds = measured[-1]["seconds"]
        else:
            seconds = 60 * measured.get("minutes", 0) or loops * measured.get("seconds_per_loop", 0)
        spans[row] = spans.get(row) or seconds
    timed = [s for s in spans.values() if s]
    total = sum(timed) / 3600
    return f"{total:.1f} hours of training in the {len(timed)} of {len(spans)} rows that recorded it, with sweeps."


def forest(assessed, path):
    """Every claim's difference in standard errors; beyond two, shaded, it is decided.

    What lies outside the axis is marked at its end.
    """
    shown = [(claim, gain / error, decided) for claim, _, _, gain, error, decided in assessed if error]
    colors = {"holds": "tab:blue", "does not hold": "tab:red", "within noise": "tab:gray"}
    edge = 12
    figure, ax = plt.subplots(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    ax.axvspan(-2, 2, color="0.92")
    ax.axvline(0, color="0.6", lw=0.8)
    for y, (_, x, decided) in enumerate(shown):
        at = max(-edge, min(edge, x))
        ax.plot([0, at], [y, y], color=colors[decided], lw=1.5)
        ax.plot(at, y, "o" if at == x else ">" if x > 0 else "<", color=colors[decided])
        if at != x:
            ax.text(0.85 * at, y, f"{x:.0f}", ha="center", va="center", fontsize=8, backgroundcolor="white")
    labels = [f"{c.text}{'†' * c.late} ({c.source}, {c.measure})" for c, *_ in shown]
    ax.set_yticks(range(len(shown)), labels, fontsize=8)
    ax.set(xlim=(-edge - 1, edge + 1), ylim=(len(shown) - 0.4, -0.6))
    ax.set(xlabel="difference towards the claim, standard errors")
    for decided, color in colors.items():
        ax.plot([], [], "o", color=color, label=decided)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows_there():
    """Every file of rows; rows of stage 1 lie in two, and in the last with their reward."""
    rewarded = [rows.load_rewarded(module.RESULTS) for module in (cost, siblings, stage2)]
    return [rows.load(stage1.RESULTS), rows.load(variation.RESULTS), *rewarded]


def assess_all(num):
    measured = {}
    for file in rows_there():
        measured |= file
    return assess(measured, num)


def page(num=rows.NUM):
    """results/claims.md, from the rows that are there."""
    assessed = assess_all(num)
    counted = Counter(decided for *_, decided in assessed)
    counts = ", ".join(f'{count} times "{decided}"' for decided, count in counted.most_common())
    return pages.joined(
        [
            INTRODUCTION,
            pages.wrapped(f"{len(assessed)} claims: {counts}. They rest on {hours(*rows_there())}"),
            "![the difference of every claim, in standard errors](../docs/claims.png)",
            PLOT,
            table(assessed),
            NOTES,
            "## What does not hold",
            reasons(assessed),
        ]
    )


INTRODUCTION = """
# The paper's claims

`python -m lab.claims` runs the rows that are missing ([stage1.md](stage1.md), [cost.md](cost.md),
[stage2.md](stage2.md), [siblings.md](siblings.md), [variation.json](variation.json)) and writes these pages;
`--only verdicts` writes this page alone, and `--print` trains nothing.

Two standard errors over three seeds decide, which is a weak bar: with no effect three seeds pass it in more than a
tenth of all cases, one way or the other. † marks claims that were written down when their rows, or those of one seed,
were there. The papers' figures (ImageReward, HPSv2, MPS, FID, IS) stand beside ours and are not the same measures.
"""

PLOT = """
Each claim's difference in standard errors. Beyond the shaded two it is decided; arrows lie outside the axis.
"""

NOTES = """
- Of `frechet` and `contrast` less is better. `prompt_accuracy` is the exact check of a picture against its prompt,
  `reward` the toy's reward model, `clip_score` and `frechet` the toy's CLIP.
- `variation` (`python -m lab.variation`) is the root mean squared difference between finished pictures (channels in
  [0, 1]) of one prompt and one first noise, when the noise after one step is drawn anew.
- "Best point", of those before the last, is chosen for each seed by the mean of the others.
- λ_ema = 0.9 was chosen by seed 0 on these prompts, and that seed counts in both EMA verdicts.
- The paper's Table 4 has "+ pixelgan" as a row of its own, so its others look to be without; ours are with, as
  Algorithm 1 is.
- Left out: that the DM loss regularises RL better than other terms (DMDR; it needs a KL baseline), and AdvDMD's
  discriminator on final states alone. Its 2-step students and DMDR's one-step ones have rows in [steps.md](steps.md).
"""


def write(num):
    """The page, its plot, and the verdicts as data."""
    pages.write("results/claims.md", num, page(num))
    assessed = assess_all(num)
    forest(assessed, rows.place("docs/claims.png", num))
    entries = []
    for claim, *rest in assessed:
        entry = {"claim": claim.text, "source": claim.source, "measure": claim.measure}
        entry |= zip(("better", "worse", "gain", "error", "verdict"), rest)
        entries.append(entry)
    rows.place("results/verdicts.json", num).write_text(json.dumps(entries, indent=1) + "\n")


WRITE = {  # part -> what writes its page and plot: (num)
    "stage1": stage1.write,
    "cost": cost.write,
    "siblings": siblings.write,
    "variation": lambda num: variation.show(),
    "table4": stage2.write,
    "table7": stage2.write,
    "verdicts": write,
}


def quick(jobs, num=200):
    """The core rows with one seed, 100 loops and 200 prompts, as a table: a look in minutes, no verdict rests on it."""
    path = rows.RUNS / "quick.json"
    rows.RUNS.mkdir(parents=True, exist_ok=True)
    first = {title: stage1.TABLES["main"][title][0] for title in (FLASH, stage1.PURE, stage1.UNPULLED)}
    first[DMD2] = cost.METHODS[DMD2]
    second = {title: stage2.TABLE4[title] for title in (JOINTLY, ALONE)}
    found = rows.load(path)
    lines = pages.head("100 loops, seed 0, 200 prompts", stage2.COLUMNS)
    for module, flags_of in ((stage1, first), (stage2, second)):
        titles, todo = {}, {}
        for title, flags in flags_of.items():
            short = flags | {"--iterations": 100}
            titles[title] = module.name(short, 0, num)
            todo[titles[title]] = lambda threads, f=short, m=module: m.measure(f, 0, num, threads)
        rows.fill(path, found, todo, jobs)
        for title, row in titles.items():
            lines.append(pages.line(title, [found[row]], stage2.COLUMNS))
    print("\n".join(lines))


def main():
    args = rows.options(__doc__.split("\n")[0], (*TRAIN, "verdicts"), quick=True)
    if args.quick:
        return quick(args.jobs)
    for part in TRAIN if not args.print else ():
        if part in args.only:
            TRAIN[part](args.num, args.jobs)
    for show in dict.fromkeys(WRITE[part] for part in args.only):  # table4 and table7 are on one page
        show(args.num)


if __name__ == "__main__":
    main()
