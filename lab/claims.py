"""The paper's claims, measured on the toy world.

    python -m lab.claims --only table4      what is missing in results/claims.json; then the table as Markdown, and docs/table4.png
    python -m lab.claims --only table7      the same with 8 steps
    python -m lab.claims --only verdicts    CLAIMS below, judged from the rows that are there: results/claims.md
    python -m lab.claims --quick            the core rows in minutes: one seed, 100 loops, 200 prompts
    python -m lab.claims --print            the tables, plots and verdicts from what is there

Rows are cached by their flags, so an interrupted call goes on; those of stage 1 are lab.stage1's, others lab.cost's, lab.siblings', lab.variation's.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance

import matplotlib.pyplot as plt

from lab import cost, rows, siblings, stage1, variation
from lab.stage1 import FULL, SEEDS

RESULTS = Path("results/claims.json")
JOINT = FULL | stage1.spelt(("rl_ratio", "rl_steps", "candidates", "carry", "pair_threshold", "beta", "ratio_clip", "rl_lr"))
COLUMNS = ("reward", "prompt_accuracy", "clip_score", "frechet", "recall", "saturation", "minutes")

TABLE4 = {  # row -> flags
    **{f"joint, {r}:1": JOINT | {"--rl-ratio": r} for r in (1, 2, 5, 10)},
    "RL alone (`--rl-only`)": JOINT | {"--rl-only": True},
    "joint, 5:1, all noise levels (`--rl-steps all`)": JOINT | {"--rl-steps": "all"},
    "joint, 5:1, without Pixel-GAN (`--gan-weight 0`)": JOINT | {"--gan-weight": 0},
}
TABLE7 = {"8 steps, joint, 5:1": JOINT | {"--student-steps": 8}}
TABLES = {"table4": (TABLE4, FULL), "table7": (TABLE7, stage1.TABLES["students"][stage1.EIGHT][0])}  # and the stage 1 that its rows start from


@dataclass
class Claim:
    """That `better` beats `worse` (titles of rows) in a measure; sign -1: smaller is better. point: of runs that are measured on their way."""

    text: str
    source: str
    better: str
    worse: str
    measure: str
    sign: int = 1
    point: int = -1


PURE, UNPULLED = "pure DM, at every step (`--gan-weight 0 --dm-steps all`)", "no EMA pull (`--ema 1`)"
JOINTLY, ALONE, TEACHER = "joint, 5:1", "RL alone (`--rl-only`)", next(iter(stage1.BASELINES))
CLAIMS = (
    Claim("Pure distribution matching is over-contrasted beside the same with Pixel-GAN", "3.3", "Flash-DMD", PURE, "contrast", -1),
    Claim("Pixel-GAN makes pictures more real", "3.3", "Flash-DMD", PURE, "frechet", -1),
    Claim("The EMA pull makes the student better", "Fig. 6", "Flash-DMD", UNPULLED, "frechet", -1),
    Claim("the same, in prompts right", "Fig. 6", "Flash-DMD", UNPULLED, "prompt_accuracy"),
    Claim("The few-step student draws prompts better than its multi-step teacher", "Table 1", "Flash-DMD", TEACHER, "prompt_accuracy"),
    Claim("The same with flow matching", "Table 2", next(iter(stage1.TABLES["sd3"])), next(iter(stage1.SD3_BASELINES)), "prompt_accuracy"),
    Claim("At TTUR 1, Flash-DMD is better than DMD2 at TTUR 5", "Table 1", "Flash-DMD, TTUR 1", cost.BASELINE, "frechet", -1),
    Claim("the same, in prompts right", "Table 1", "Flash-DMD, TTUR 1", cost.BASELINE, "prompt_accuracy"),
    Claim(
        "More updates of the score estimator, and longer training, improve Flash-DMD",
        "Table 1",
        "Flash-DMD, TTUR 2",
        "Flash-DMD, TTUR 1",
        "frechet",
        -1,
    ),
    Claim("DMD2 degrades at TTUR 2", "Fig. 5", cost.BASELINE, "DMD2, TTUR 2", "frechet", -1),
    Claim("Pictures vary more with the noise of high-noise steps", "Fig. 3", variation.title(999), variation.title(499), "variation"),
    Claim("Stage 2 is preferred to stage 1", "Table 3", JOINTLY, "stage 1", "reward"),
    Claim("Stage 2 is preferred to the teacher", "Table 3", JOINTLY, TEACHER, "reward"),
    Claim("Joint training keeps what preference optimisation alone destroys: prompts right", "Table 4", JOINTLY, ALONE, "prompt_accuracy"),
    Claim("the same, Fréchet distance", "Table 4", JOINTLY, ALONE, "frechet", -1),
    Claim("the same, the reward itself", "Table 4", JOINTLY, ALONE, "reward"),
    Claim("Preference at the two noisiest steps beats all steps", "Table 4", JOINTLY, "joint, 5:1, all noise levels (`--rl-steps all`)", "reward"),
    Claim("Pixel-GAN keeps joint training real", "Fig. 7", JOINTLY, "joint, 5:1, without Pixel-GAN (`--gan-weight 0`)", "frechet", -1),
    Claim("With 8 steps, stage 1 is preferred to the teacher", "Table 6", stage1.EIGHT, TEACHER, "reward"),
    Claim("With 8 steps, stage 2 is preferred to stage 1", "Table 7", "8 steps, joint, 5:1", stage1.EIGHT, "reward"),
    Claim(
        "Dynamic training speeds the cold start (after a fifth of the loops)",
        "DMDR",
        "DMDR, no reward",
        "DMDR, no reward, no dynamic training",
        "frechet",
        -1,
        point=0,
    ),
    Claim("With reward, the few-step student outdoes its teacher", "DMDR", "DMDR", TEACHER, "reward"),
    Claim("the same, in prompts right", "DMDR", "DMDR", TEACHER, "prompt_accuracy"),
    Claim("Reward costs recall", "DMDR", "DMDR, no reward", "DMDR", "recall"),
    Claim("The discriminator as reward makes the student better", "AdvDMD", "AdvDMD", siblings.UNREWARDED, "frechet", -1),
    Claim("the same, in prompts right", "AdvDMD", "AdvDMD", siblings.UNREWARDED, "prompt_accuracy"),
    Claim("4 steps outdo the multi-step teacher", "AdvDMD", "AdvDMD", TEACHER, "prompt_accuracy"),
    Claim("An online reward is hacked less than a frozen one", "AdvDMD", "AdvDMD", siblings.FROZEN, "frechet", -1),
)


def loops(flags):
    """300 preference updates after the 400 loops of stage 1, beside them distillation's; --iterations counts updates of either kind."""
    updates = flags["--iterations"] * 3 // 4
    return updates if "--rl-only" in flags else updates + updates // flags["--rl-ratio"]


def measure(flags, seed, num, threads):
    """One stage-2 run -> its metrics, minutes, and its held-out judges over the run."""
    out = rows.folder(name(flags, seed, num))
    before = FULL | {k: flags[k] for k in ("--iterations", "--student-steps")}
    settings = {
        "--iterations": loops(flags),
        "--init": stage1.student(seed, num, threads, before),
        "--seed": seed,
        "--preview-every": 60,
        "--out": out,
        "--overwrite": True,
    }
    rows.command("train.py", "--stage", 2, *rows.flat(flags | settings), threads=threads)
    rows.command("evaluate.py", "--run", out, "--num", num, "--json", out / "metrics.json", threads=threads)
    metrics = json.loads((out / "metrics.json").read_text())
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    path = [{k: v for k, v in m.items() if k.startswith("held_out") or k == "rl_updates"} for m in logged if "held_out_reward" in m]
    shutil.rmtree(out)
    return metrics | {"minutes": logged[-1]["seconds"] / 60, "path": path}


def measure_start(before, which, num, threads):
    """Stage 1 of a seed with flags `before`, or the teacher."""
    path = rows.folder(start(before, which, num)).with_suffix(".json")
    what = stage1.BASELINES[TEACHER] if which == TEACHER else ("--run", stage1.student(which, num, threads, before))
    rows.command("evaluate.py", *what, "--num", num, "--json", path, threads=threads)
    return json.loads(path.read_text())


def start(before, which, num):
    """The row's name of a seed's stage 1 with flags `before`, or of the teacher."""
    return f"{TEACHER}, {num} prompts" if which == TEACHER else stage1.name(before, which, num)


def name(flags, seed, num):
    return rows.key(flags, "--stage", 2, "--seed", seed, f"{num} prompts")


def print_table(which, results, num):
    found, before = TABLES[which]
    rows.head(which.replace("table", "Table "), COLUMNS)
    table = {TEACHER: [start(before, TEACHER, num)], "stage 1": [start(before, s, num) for s in SEEDS]}
    table |= {title: [name(flags, s, num) for s in SEEDS] for title, flags in found.items()}
    for title, names in table.items():
        if found := [results[n] for n in names if n in results]:
            rows.line(title, found, COLUMNS)


def verdict(better, worse, sign):
    """Values over seeds of both sides -> (difference towards the claim, its standard error, the verdict): two standard errors decide.

    A side with one seed has no error of its own: then nothing is decided.
    """
    gain = sign * (mean(better) - mean(worse))
    if min(len(better), len(worse)) < 2:
        return gain, None, "one seed, not judged"
    error = (variance(better) / len(better) + variance(worse) / len(worse)) ** 0.5
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def values(measured, title, measure, num, point):
    """A measure of a row, seed by seed. No training seed is in the teacher's value: it counts as two equal ones.

    The noise of the prompts is on both sides, and in no error: all rows draw the same ones.
    """
    if flags := (cost.METHODS | siblings.METHODS).get(title):
        names = [cost.name(flags, s, num) for s in SEEDS]
        return [measured[n][point][measure] for n in names if n in measured]
    if title in variation.TITLES:
        return [measured[n][title] for s in SEEDS if (n := variation.name(s)) in measured]
    names = {t: [stage1.baseline_name(t, num)] * 2 for t in stage1.BASELINES | stage1.SD3_BASELINES}
    names |= {"stage 1": [start(FULL, s, num) for s in SEEDS]}
    names |= {t: [name(flags, s, num) for s in SEEDS] for t, flags in (TABLE4 | TABLE7).items()}
    names |= {t: [stage1.name(flags, s, num) for s in seeds] for table in stage1.TABLES.values() for t, (flags, seeds) in table.items()}
    return [measured[n][measure] for n in names[title] if n in measured]


def verdicts(measured, num, path="results/claims.md"):
    """CLAIMS as a Markdown table, printed and written."""
    lines = ["| claim | source | measure | claimed better | claimed worse | difference | verdict |", "| --- |" + " --- |" * 6]
    for c in CLAIMS:
        a, b = (values(measured, title, c.measure, num, c.point) for title in (c.better, c.worse))
        if a and b:
            gain, error, judged = verdict(a, b, c.sign)
            shown = f"{gain:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            lines.append(f"| {c.text} | {c.source} | {c.measure} | {c.better}: {mean(a):.4f} | {c.worse}: {mean(b):.4f} | {shown} | {judged} |")
        else:
            lines.append(f"| {c.text} | {c.source} | {c.measure} | {c.better} | {c.worse} | | not run |")
    Path(path).write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))


def plot(results, num, path="docs/table4.png"):
    """Reward and held-out accuracy over RL updates, joint and RL alone: each seed thin, their mean thick. 64 held-out prompts a point."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for title, color in (("joint, 5:1", "tab:blue"), ("RL alone (`--rl-only`)", "tab:red")):
        paths = [results[n]["path"] for s in SEEDS if (n := name(TABLE4[title], s, num)) in results]
        for ax, judge in zip(axes, ("held_out_reward", "held_out_prompt_accuracy")):
            for path_of_seed in paths:
                ax.plot([p["rl_updates"] for p in path_of_seed], [p[judge] for p in path_of_seed], color=color, lw=0.7, alpha=0.5)
            if paths:
                means = [mean(p[judge] for p in points) for points in zip(*paths)]
                ax.plot([p["rl_updates"] for p in paths[0]], means, color=color, lw=2, label=title.split(" (")[0])
            ax.set(xlabel="preference updates", title=judge.replace("held_out_", "held-out ").replace("_", " "))
    axes[0].legend()
    figure.savefig(path, dpi=110)


def quick(jobs, num=200):
    """The core rows with one seed, 100 loops and 200 prompts, as a table: a look in minutes, on which no verdict rests."""
    path, short = rows.RUNS / "quick.json", {"--iterations": 100}
    rows.RUNS.mkdir(parents=True, exist_ok=True)
    first = {t: stage1.TABLES["main"][t][0] | short for t in ("Flash-DMD", PURE, UNPULLED)} | {cost.BASELINE: cost.METHODS[cost.BASELINE] | short}
    second, found = {t: TABLE4[t] | short for t in (JOINTLY, ALONE)}, rows.load(path)
    for table, measure_, name_ in ((first, stage1.measure, stage1.name), (second, measure, name)):
        rows.fill(path, found, {name_(f, 0, num): lambda threads, f=f, m=measure_: m(f, 0, num, threads) for f in table.values()}, jobs)
    rows.head("100 loops, seed 0, 200 prompts", COLUMNS)
    for table, name_ in ((first, stage1.name), (second, name)):
        for title, flags in table.items():
            rows.line(title, [found[name_(flags, 0, num)]], COLUMNS)


def main():
    args = rows.options(__doc__.split("\n")[0], (*TABLES, "verdicts"), quick=True)
    if args.quick:
        return quick(args.jobs)
    results = rows.load(RESULTS, reward_crc32=rows.crc32("toy/lrm/unet/diffusion_pytorch_model.safetensors"))
    for which in [w for w in TABLES if w in args.only]:
        if not args.print:
            run_table(which, results, args)
        print_table(which, results, args.num)
    if "table4" in args.only:
        plot(results, args.num)
    if "verdicts" in args.only:
        others = rows.load(stage1.RESULTS) | rows.load(cost.RESULTS) | rows.load(siblings.RESULTS) | rows.load(variation.RESULTS)
        verdicts(others | results, args.num)  # rows of stage 1 lie in both, here with the reward


def run_table(which, results, args):
    """What is missing of a table's rows, and of those they start from."""
    table, before = TABLES[which]
    with ThreadPoolExecutor(args.jobs) as pool:  # first, so that no two rows train the same one
        list(pool.map(lambda s: stage1.student(s, args.num, max(1, os.cpu_count() // args.jobs), before), SEEDS))
    starts = {start(before, w, args.num): w for w in (TEACHER, *SEEDS)}
    rows.fill(RESULTS, results, {row: lambda threads, w=w: measure_start(before, w, args.num, threads) for row, w in starts.items()}, args.jobs)
    core = [t for t in (JOINTLY, ALONE) if t in table]  # first: the claims rest on them
    chosen = [(table[t], seed) for part in (core, [t for t in table if t not in core]) for seed in SEEDS for t in part]
    jobs = {name(f, s, args.num): lambda threads, f=f, s=s: measure(f, s, args.num, threads) for f, s in chosen}
    rows.fill(RESULTS, results, jobs, args.jobs)


if __name__ == "__main__":
    main()
