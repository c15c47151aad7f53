"""The paper's claims, and those of its siblings DMDR and AdvDMD, measured on the toy world.

    python -m lab.claims                    runs every row that is missing, then judges CLAIMS: results/claims.md, verdicts.json; many hours
    python -m lab.claims --only table4      one part: its rows in results/, its table as Markdown, its plot
    python -m lab.claims --only verdicts    CLAIMS from the rows that are there
    python -m lab.claims --quick            the core rows in minutes: one seed, 100 loops, 200 prompts
    python -m lab.claims --print            tables, plots and verdicts; trains nothing

Rows are cached by their flags, so an interrupted call goes on. Parts are named after lab/'s modules, whose own commands print the other tables.
Claims marked `late` (†) were written down when their rows were there (ratios; CLIP scores; prompts right of stage 2 against stage 1, and of all
noise levels; Pixel-GAN with DM at the noisy steps; Table 1 in reward, but for TTUR 5), or those of seed 0 (renoising, DM at every step): it was
known what they would say. Of all others, but the contrast claim (README), one side at least was still to be run.
Left out: that the DM loss regularises RL better than others do (DMDR; needs a KL baseline), 2-step students and D on final states alone (AdvDMD).
"""

import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance

import matplotlib.pyplot as plt

from lab import cost, rows, siblings, stage1, stage2, variation
from lab.stage1 import FULL, SEEDS
from lab.stage2 import ALL_NOISE, ALONE, JOINTLY, JOINTLY8, TEACHER, UNREAL

TRAIN = {  # part -> what runs its missing rows: (num, workers)
    "stage1": lambda *n: stage1.train(("main", "variants", "students", "sd3"), *n),
    "cost": lambda *n: cost.train(cost.METHODS, *n),
    "siblings": lambda *n: siblings.train(siblings.METHODS, *n),
    "variation": lambda num, workers: variation.train(num),
    "table4": lambda *n: stage2.train("table4", *n),
    "table7": lambda *n: stage2.train("table7", *n),
}
METHODS = cost.METHODS | siblings.METHODS
SMALLER = ("frechet", "contrast")  # is better, in these measures


@dataclass
class Claim:
    """That `better` beats `worse` (titles of rows) in a measure.

    paper: its figures, where it prints them. points: of rows that are measured on their way, the one for each side; "best": at_best.
    late: rows of it were there when it was written. reason: where it does not hold here, the likely reason, and what was tried.
    """

    text: str
    source: str
    better: str
    worse: str
    measure: str
    paper: str = ""
    points: tuple = (-1, -1)
    late: bool = False
    reason: str = ""

    def sign(self):
        return -1 if self.measure in SMALLER else 1


OVER_CONTRAST = """Guess: over-contrast comes with much guidance; the toy's score is guided at w = 3, DMD2's on SDXL at 8. Tried: w = 5 with Pixel-GAN
(contrast 0.096, real scenes 0.091), not without."""
CEILING = """Likely: prompts right has a ceiling, which 50 steps nearly reach (98.2 %), and the paper's scores have none; in reward stage 1 does pass
the teacher (14.82 for 14.55). Tried: rates, schedules, w = 5, two GAN weights and four EMA factors, none above 95.0 %;
8 steps reach 97.5 %."""
SD3_CEILING = """As above (the teacher has 97.9 %). Tried with seed 0: other rates, TTUR 2, DM at every step, w = 1.5 and 2, none above 95.2 %."""
OPTIMISED = """Likely: the reward judged here is the one optimised, so it grows with the share of preference updates; the paper's ImageReward is
another judge. Tried: ratios 1, 2, 5 and 10, and rates 5e-6 and 2e-5 for the joint run (seed 0), which trade reward for Fréchet distance."""
SUREST = """Guess: this reward model is surest at little noise, and a third pair per rollout is half as much again to learn from. Tried: nothing."""
NARROW = """Guess: the toy's CLIP knows the world's scenes alone, and the pictures of RL alone leave them (Fréchet distance 5.88); in the paper the
two are 0.0009 apart. Tried: nothing."""
TRACKED = """Guess: after equally many generator updates (400; the paper: 1,000 and 3,600) TTUR 5 has seen five times the samples, and its score
estimator follows better. Tried: TTUR 2, which has more reward than TTUR 1 too (15.07)."""
HALF_WAY = """As in Table 1 (the teacher has 98.2 %), after 200 updates of G, half of stage 1's. Tried: nothing."""
FLASH, DMD2, COLD = "Flash-DMD", cost.BASELINE, (siblings.COLD, siblings.COLD)
TUNED, (TTUR1, TTUR2, TTUR5, DMD2_TTUR2) = cost.TUNED, (t for t in cost.METHODS if t not in (DMD2, cost.TUNED))
SD3, SD3_TEACHER = next(iter(stage1.TABLES["sd3"])), next(iter(stage1.SD3_BASELINES))
ACCURACY = "prompt_accuracy"
CLAIMS = (
    Claim("Pure DM, at every step, is over-contrasted beside Flash-DMD", "3.3", FLASH, stage1.PURE, "contrast", reason=OVER_CONTRAST),
    Claim("Flash-DMD's pictures are more real than those of pure DM", "3.3", FLASH, stage1.PURE, "frechet"),
    Claim("With DM at every step, Pixel-GAN makes pictures more real", "3.3", stage1.EVERY_STEP, stage1.PURE, "frechet", late=True),
    Claim("With DM at the noisy steps, Pixel-GAN makes pictures more real", "3.3", FLASH, stage1.UNSEEN, "frechet", late=True),
    Claim("DM at the noisy steps alone beats DM at every step", "3.3", FLASH, stage1.EVERY_STEP, "frechet", late=True),
    Claim("Renoising over the whole range beats high noise alone", "3.1", FLASH, stage1.HIGH_NOISE, "frechet", late=True),
    Claim("Renoising over the whole range beats low noise alone", "3.1", FLASH, stage1.LOW_NOISE, "frechet", late=True),
    Claim("The EMA pull makes the student better", "Fig. 6", FLASH, stage1.UNPULLED, "frechet"),
    Claim("The EMA pull gets more prompts right", "Fig. 6", FLASH, stage1.UNPULLED, ACCURACY, "HPSv2 nearly the same"),
    Claim("The student is preferred to its teacher", "Table 1", "stage 1", TEACHER, "reward", "ImageReward 0.9509, 0.7143", late=True),
    Claim("The student gets more prompts right than its teacher", "Table 1", FLASH, TEACHER, ACCURACY, "HPSv2 0.2968, 0.2865", reason=CEILING),
    Claim("With flow matching it does so too", "Table 2", SD3, SD3_TEACHER, ACCURACY, "HPSv2 0.2976, 0.2933", reason=SD3_CEILING),
    Claim("At TTUR 1, Flash-DMD is better than DMD2 at TTUR 5", "Table 1", TTUR1, DMD2, "frechet", "ImageReward 0.9509, 0.8748"),
    Claim("At TTUR 1, it gets more prompts right than DMD2 at TTUR 5", "Table 1", TTUR1, DMD2, ACCURACY, "HPSv2 0.2968, 0.2937"),
    Claim("At TTUR 1, it is preferred to DMD2 at TTUR 5", "Table 1", TTUR1, DMD2, "reward", "ImageReward 0.9509, 0.8748", late=True),
    Claim("But it does not have DMD2's CLIP score", "Table 1", DMD2, TTUR1, "clip_score", "0.3302, 0.3292", late=True),
    Claim("At TTUR 2, Flash-DMD is better than DMD2 at TTUR 5", "Table 1", TTUR2, DMD2, "frechet", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 2, it is preferred to DMD2 at TTUR 5", "Table 1", TTUR2, DMD2, "reward", "ImageReward 0.9740, 0.8748", late=True),
    Claim("At TTUR 5, Flash-DMD is better than DMD2", "Table 1", TTUR5, DMD2, "frechet", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 5, it is preferred to DMD2", "Table 1", TTUR5, DMD2, "reward", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 1, Flash-DMD is better than DMD2 tuned", "Table 1", TTUR1, TUNED, "frechet", "ImageReward 0.9509, 0.8748"),
    Claim("At TTUR 1, it gets more prompts right than DMD2 tuned", "Table 1", TTUR1, TUNED, ACCURACY, "HPSv2 0.2968, 0.2937"),
    Claim("At TTUR 1, it is preferred to DMD2 tuned", "Table 1", TTUR1, TUNED, "reward", "ImageReward 0.9509, 0.8748"),
    Claim("At TTUR 2, Flash-DMD is better than DMD2 tuned", "Table 1", TTUR2, TUNED, "frechet", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 2, it is preferred to DMD2 tuned", "Table 1", TTUR2, TUNED, "reward", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 5, Flash-DMD is better than DMD2 tuned", "Table 1", TTUR5, TUNED, "frechet", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 5, it is preferred to DMD2 tuned", "Table 1", TTUR5, TUNED, "reward", "ImageReward 0.9426, 0.8748"),
    Claim("TTUR 2, trained longer, beats TTUR 1", "Table 1", TTUR2, TTUR1, "frechet", "ImageReward 0.9740, 0.9509"),
    Claim("TTUR 2, trained longer, has more reward than TTUR 1", "Table 1", TTUR2, TTUR1, "reward", "ImageReward 0.9740, 0.9509", late=True),
    Claim("TTUR 5 gains CLIP score on TTUR 1", "Table 1", TTUR5, TTUR1, "clip_score", "0.3302, 0.3292"),
    Claim("TTUR 1 has more reward than TTUR 5", "Table 1", TTUR1, TTUR5, "reward", "ImageReward 0.9509, 0.9426", reason=TRACKED),
    Claim("DMD2 is worse at TTUR 2 than at TTUR 5", "3.2", DMD2, DMD2_TTUR2, "frechet"),
    Claim("At TTUR 2, DMD2 gains a little, then degrades", "Fig. 5", DMD2_TTUR2, DMD2_TTUR2, "frechet", points=("best", -1)),
    Claim("At TTUR 2, Flash-DMD improves from first point to last", "Fig. 5", TTUR2, TTUR2, "frechet", points=(-1, 0)),
    Claim("At TTUR 2, Flash-DMD is better than DMD2", "Fig. 5", TTUR2, DMD2_TTUR2, "frechet"),
    Claim("Pictures vary more with the noise of high-noise steps", "Fig. 3", variation.title(999), variation.title(499), "variation"),
    Claim("Stage 2 is preferred to stage 1", "Table 3", JOINTLY, "stage 1", "reward", "ImageReward 1.0035, 0.9509"),
    Claim("Stage 2 is preferred to the teacher", "Table 3", JOINTLY, TEACHER, "reward", "ImageReward 1.0035, 0.7143"),
    Claim("Stage 2 costs CLIP score", "Table 3", "stage 1", JOINTLY, "clip_score", "0.3292, 0.3285", late=True),
    Claim("Stage 2 costs prompts right", "Table 3", "stage 1", JOINTLY, ACCURACY, "HPSv2 0.2968, 0.2930", late=True),
    Claim("5:1 has more reward than 1:1", "Table 4", JOINTLY, "joint, 1:1", "reward", "ImageReward 0.9808, 0.9135", late=True),
    Claim("5:1 has more reward than 2:1", "Table 4", JOINTLY, "joint, 2:1", "reward", "ImageReward 0.9808, 0.9315", late=True),
    Claim("5:1 has more reward than 10:1", "Table 4", JOINTLY, "joint, 10:1", "reward", "ImageReward 0.9808, 0.9640", late=True, reason=OPTIMISED),
    Claim("Joint training keeps prompts right that RL alone loses", "Table 4", JOINTLY, ALONE, ACCURACY, "HPSv2 0.2904, 0.2882"),
    Claim("Joint training keeps the realism that RL alone destroys", "Table 4", JOINTLY, ALONE, "frechet", "MPS 12.764, 12.689"),
    Claim("Joint training has more reward than RL alone", "Table 4", JOINTLY, ALONE, "reward", "ImageReward 0.9808, 0.9795", reason=OPTIMISED),
    Claim("RL alone has the higher CLIP score", "Table 4", ALONE, JOINTLY, "clip_score", "0.3284, 0.3275", late=True, reason=NARROW),
    Claim("RL at the two noisiest steps beats all steps", "Table 4", JOINTLY, ALL_NOISE, "reward", "ImageReward 0.9808, 0.9421", reason=SUREST),
    Claim("RL at all steps has the higher CLIP score", "Table 4", ALL_NOISE, JOINTLY, "clip_score", "0.3294, 0.3275", late=True),
    Claim("RL at all steps gets more prompts right", "Table 4", ALL_NOISE, JOINTLY, ACCURACY, "HPSv2 0.2925, 0.2904", late=True),
    Claim("Pixel-GAN keeps joint training real", "Fig. 7", JOINTLY, UNREAL, "frechet", "MPS 12.812, 12.764"),
    Claim("With 8 steps, stage 1 is preferred to the teacher", "Table 6", stage1.EIGHT, TEACHER, "reward", "ImageReward 0.9159, 0.7143"),
    Claim("With 8 steps, stage 2 is preferred to stage 1", "Table 7", JOINTLY8, stage1.EIGHT, "reward", "ImageReward 1.0012, 0.9159"),
    Claim("Dynamic training speeds the cold start (just after its end)", "DMDR", siblings.UNPAID, siblings.STATIC, "frechet", points=COLD),
    Claim("DMDR is better than DMD2, in half the loops", "DMDR", siblings.PAID, DMD2, "frechet"),
    Claim("With reward, the student is preferred to its teacher", "DMDR", siblings.PAID, TEACHER, "reward"),
    Claim("With reward, it gets more prompts right than its teacher", "DMDR", siblings.PAID, TEACHER, ACCURACY, reason=HALF_WAY),
    Claim("Joint RL raises the reward", "DMDR", siblings.PAID, siblings.UNPAID, "reward", "IS 416, 232"),
    Claim("Reward costs realism", "DMDR", siblings.UNPAID, siblings.PAID, "frechet", "FID 2.13, 6.95"),
    Claim("Reward costs recall", "DMDR", siblings.UNPAID, siblings.PAID, "recall", "0.64, 0.40"),
    Claim("The discriminator as reward makes the student better", "AdvDMD", siblings.JUDGED, siblings.UNREWARDED, "frechet"),
    Claim("The discriminator as reward gets more prompts right", "AdvDMD", siblings.JUDGED, siblings.UNREWARDED, ACCURACY),
    Claim("4 steps get more prompts right than the teacher", "AdvDMD", siblings.JUDGED, TEACHER, ACCURACY, reason=HALF_WAY),
    Claim("An online reward is hacked less than a frozen one", "AdvDMD", siblings.JUDGED, siblings.FROZEN, "frechet"),
)


def verdict(better, worse, sign):
    """Values over seeds of both sides -> (difference towards the claim, its standard error, the verdict): two standard errors decide.

    A weak bar: with no effect, three seeds pass it in more than a tenth of all cases. The two sides count as independent, though they share
    data, some their stage 1; paired by seed, errors are smaller or larger. With fewer than all of SEEDS nothing is decided.
    """
    gain = sign * (mean(better) - mean(worse))
    if (seeds := min(len(better), len(worse))) < len(SEEDS):
        return gain, None, f"{seeds} of {len(SEEDS)} seeds, not judged"
    error = (variance(better) / len(better) + variance(worse) / len(worse)) ** 0.5
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def at_best(runs, sign):
    """Runs' values point by point -> each at the point before the last that is best in the mean of the others: no run's own noise chooses for it."""
    chosen = []
    for run in runs:
        others = [r for r in runs if r is not run] or [run]
        chosen.append(run[max(range(len(run) - 1), key=lambda i: sign * mean(r[i] for r in others))])
    return chosen


def values(measured, title, measure, sign, point, num):
    """A measure of a row, seed by seed. No training seed is in the teacher's value: it counts as three equal ones.

    The noise of the prompts is on both sides, and in no error: all rows draw the same ones.
    """
    if flags := METHODS.get(title):
        runs = [[p[measure] for p in measured[n]] for s in SEEDS if (n := cost.name(flags, s, num)) in measured]
        return at_best(runs, sign) if point == "best" else [run[point] for run in runs]
    if title in variation.TITLES:
        return [measured[n][title] for s in SEEDS if (n := variation.name(s)) in measured]
    names = {t: [stage1.baseline_name(t, num)] * len(SEEDS) for t in stage1.BASELINES | stage1.SD3_BASELINES}
    names |= {"stage 1": [stage2.start(FULL, s, num) for s in SEEDS]}
    names |= {t: [stage2.name(flags, s, num) for s in SEEDS] for t, flags in (stage2.TABLE4 | stage2.TABLE7).items()}
    names |= {t: [stage1.name(flags, s, num) for s in seeds] for table in stage1.TABLES.values() for t, (flags, seeds) in table.items()}
    return [measured[n][measure] for n in names[title] if n in measured]


def side(title, point):
    """A row's title as the table shows it, with its point where that is not the last."""
    return title if point == -1 else f"{title}, best point" if point == "best" else f"{title}, point {point + 1} of {cost.POINTS}"


def judge(measured, num):
    """-> for each of CLAIMS (claim, values of the better side, of the worse, gain, error, verdict), the last three None where a side has no row."""
    judged = []
    for c in CLAIMS:
        sides = [values(measured, title, c.measure, c.sign(), point, num) for title, point in zip((c.better, c.worse), c.points)]
        judged.append((c, *sides, *(verdict(*sides, c.sign()) if all(sides) else (None, None, "not run"))))
    return judged


def verdicts(judged, found, trained):
    """Lines of Markdown: where and how long, CLAIMS as a table, reasons, the headline. found: cost's rows; trained: of `hours`."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    lines = [f"Written on {os.cpu_count()} cores of an {model[1] if model else platform.processor()}; {trained}.", ""]
    columns = ("claim", "source", "there (better, worse)", "measure here", "claimed better", "claimed worse", "difference", "verdict")
    lines += ["| " + " | ".join(columns) + " |", "| --- |" + " --- |" * (len(columns) - 1)]
    for c, a, b, gain, error, verdict_ in judged:
        shown = [side(t, p) + (f": {mean(v):.4f}" if v else "") for t, p, v in zip((c.better, c.worse), c.points, (a, b))]
        difference = "" if gain is None else f"{gain:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        cells = (c.text + "†" * c.late, c.source, c.paper, c.measure, *shown, difference, verdict_)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "† Written down when its rows, or those of one seed, were there.", "", "What does not hold:", ""]
    for c, *_, verdict_ in judged:
        if verdict_ == "does not hold":
            lines.append(f"- {c.text} ({c.source}, {c.measure}). {' '.join(c.reason.split()) or 'No reason is known yet.'}")
    return [*lines, "", *cost.headline(found), "", *cost.headline(found, cost.TUNED)]


def hours(*files):
    """A sentence: the training time of all rows that recorded it. Rows of stage 1 have seconds a loop, others their sum."""
    spans = {}
    for row, m in (entry for file in files for entry in file.items() if "--iterations" in entry[0]):
        loops = int(re.search(r"--iterations (\d+)", row)[1])
        seconds = m[-1]["seconds"] if isinstance(m, list) else 60 * m.get("minutes", 0) or loops * m.get("seconds_per_loop", 0)
        spans[row] = spans.get(row) or seconds
    timed = [s for s in spans.values() if s]
    return f"{sum(timed) / 3600:.1f} hours of training in the {len(timed)} of {len(spans)} rows that recorded it, with sweeps, beside other work"


def forest(judged, path):
    """Every judged claim's difference in standard errors; beyond two, shaded, it is decided. What lies outside the axis is marked at its end."""
    shown = [(c, gain / error, v) for c, _, _, gain, error, v in judged if error]
    colors, edge = {"holds": "tab:blue", "does not hold": "tab:red", "within noise": "tab:gray"}, 12
    figure, ax = plt.subplots(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    ax.axvspan(-2, 2, color="0.92")
    ax.axvline(0, color="0.6", lw=0.8)
    for y, (_, x, v) in enumerate(shown):
        at = max(-edge, min(edge, x))
        ax.plot([0, at], [y, y], color=colors[v], lw=1.5)
        ax.plot(at, y, "o" if at == x else ">" if x > 0 else "<", color=colors[v])
        if at != x:
            ax.text(0.85 * at, y, f"{x:.0f}", ha="center", va="center", fontsize=8, backgroundcolor="white")
    ax.set_yticks(range(len(shown)), [f"{c.text}{'†' * c.late} ({c.source}, {c.measure})" for c, *_ in shown], fontsize=8)
    ax.set(xlim=(-edge - 1, edge + 1), ylim=(len(shown) - 0.4, -0.6), xlabel="difference towards the claim, standard errors")
    for v, color in colors.items():
        ax.plot([], [], "o", color=color, label=v)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def quick(jobs, num=200):
    """The core rows with one seed, 100 loops and 200 prompts, as a table: a look in minutes, on which no verdict rests."""
    path, short = rows.RUNS / "quick.json", {"--iterations": 100}
    rows.RUNS.mkdir(parents=True, exist_ok=True)
    first = {t: stage1.TABLES["main"][t][0] | short for t in (FLASH, stage1.PURE, stage1.UNPULLED)} | {DMD2: cost.METHODS[DMD2] | short}
    second, found = {t: stage2.TABLE4[t] | short for t in (JOINTLY, ALONE)}, rows.load(path)
    for table, measure_, name_ in ((first, stage1.measure, stage1.name), (second, stage2.measure, stage2.name)):
        rows.fill(path, found, {name_(f, 0, num): lambda threads, f=f, m=measure_: m(f, 0, num, threads) for f in table.values()}, jobs)
    rows.head("100 loops, seed 0, 200 prompts", stage2.COLUMNS)
    for table, name_ in ((first, stage1.name), (second, stage2.name)):
        for title, flags in table.items():
            rows.line(title, [found[name_(flags, 0, num)]], stage2.COLUMNS)


def show(part, num):
    """A part's table or plot, from the rows that are there."""
    results, costs, paid = (rows.load_rewarded(path) for path in (stage2.RESULTS, cost.RESULTS, siblings.RESULTS))
    found = cost.found_of(cost.METHODS, costs, num)
    if part in stage2.TABLES:
        stage2.print_table(part, results, num)
    if part == "table4":
        stage2.plot(results, num, rows.place("docs/table4.png", num))
    if part == "cost":
        cost.plot(found, rows.place("docs/cost.png", num))
    if part == "siblings":
        siblings.plot(cost.found_of(siblings.METHODS, paid, num), num)
    if part == "verdicts":
        first = rows.load(stage1.RESULTS)
        judged = judge(first | costs | paid | rows.load(variation.RESULTS) | results, num)  # rows of stage 1 lie in two, in the last with reward
        lines = verdicts(judged, found, hours(first, costs, paid, results))
        rows.place("results/claims.md", num).write_text("\n".join(lines) + "\n")
        print("\n".join(["", *lines]))
        forest(judged, rows.place("docs/claims.png", num))
        kept = ("better", "worse", "gain", "error", "verdict")
        entries = [{"claim": c.text, "source": c.source, "measure": c.measure} | dict(zip(kept, rest)) for c, *rest in judged]
        rows.place("results/verdicts.json", num).write_text(json.dumps(entries, indent=1) + "\n")


def main():
    args = rows.options(__doc__.split("\n")[0], (*TRAIN, "verdicts"), quick=True)
    if args.quick:
        return quick(args.jobs)
    for part in TRAIN if not args.print else ():
        if part in args.only:
            TRAIN[part](args.num, args.jobs)
    for part in args.only:
        show(part, args.num)


if __name__ == "__main__":
    main()
