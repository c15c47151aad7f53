"""Stage 2 (Tables 4 and 7, Fig. 7): joint training, its variants, and preference optimisation alone.

    python -m lab.claims --only table4 table7

This runs the rows that are missing in results/claims.json, from the students of lab.stage1, and writes
results/stage2.md and docs/table4.png.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from lab import pages, rows, stage1
from lab.pages import average, errors, figure, frechet, right
from lab.rows import SEEDS
from lab.stage1 import FULL

RESULTS = Path("results/claims.json")
PREFERENCE = stage1.spelt(
    ("rl_ratio", "rl_steps", "candidates", "carry", "pair_threshold", "beta", "ratio_clip", "rl_lr")
)
JOINT = FULL | PREFERENCE
COLUMNS = ("reward", "prompt_accuracy", "clip_score", "frechet", "recall", "saturation", "minutes")
TEACHER = next(iter(stage1.BASELINES))
STAGE1 = "stage 1"
JOINTLY = "joint, 5:1"
ALONE = "RL alone (`--rl-only`)"
ALL_NOISE = "joint, 5:1, all noise levels (`--rl-steps all`)"
UNREAL = "joint, 5:1, without Pixel-GAN (`--gan-weight 0`)"
JOINTLY8 = "8 steps, joint, 5:1"

RATIOS = {
    "joint, 1:1": JOINT | {"--rl-ratio": 1},
    "joint, 2:1": JOINT | {"--rl-ratio": 2},
    JOINTLY: JOINT,
    "joint, 10:1": JOINT | {"--rl-ratio": 10},
}
TABLE4 = {  # row -> flags
    **RATIOS,
    ALONE: JOINT | {"--rl-only": True},
    ALL_NOISE: JOINT | {"--rl-steps": "all"},
    UNREAL: JOINT | {"--gan-weight": 0},
}
TABLE7 = {JOINTLY8: JOINT | {"--student-steps": 8}}
STUDENT8 = stage1.TABLES["students"][stage1.EIGHT][0]
TABLES = {"table4": (TABLE4, FULL), "table7": (TABLE7, STUDENT8)}  # and the stage 1 that its rows start from


def loops(flags):
    """300 preference updates after the 400 loops of stage 1, beside them distillation's.

    --iterations counts updates of either kind.
    """
    updates = flags["--iterations"] * 3 // 4
    return updates if "--rl-only" in flags else updates + updates // flags["--rl-ratio"]


def measure(flags, seed, num, threads):
    """One stage-2 run -> its metrics, its minutes, and the path of what is held out."""
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
    metrics["minutes"] = logged[-1]["seconds"] / 60
    metrics["path"] = []
    for entry in logged:
        if "held_out_reward" in entry:
            kept = {k: v for k, v in entry.items() if k.startswith("held_out") or k == "rl_updates"}
            metrics["path"].append(kept)
    shutil.rmtree(out)
    return metrics


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


def rows_of(which, results, num):
    """{title: rows of its seeds} of a table, the teacher and stage 1 first, from the rows that are there."""
    flags_of, before = TABLES[which]
    names = {TEACHER: [start(before, TEACHER, num)], STAGE1: [start(before, s, num) for s in SEEDS]}
    for title, flags in flags_of.items():
        names[title] = [name(flags, s, num) for s in SEEDS]
    found = {}
    for title, of_seeds in names.items():
        if there := [results[n] for n in of_seeds if n in results]:
            found[title] = there
    return found


def table(which, results, num):
    """A table in lines of Markdown."""
    found = rows_of(which, results, num)
    return pages.head("", COLUMNS) + [pages.line(title, there, COLUMNS) for title, there in found.items()]


def train(which, num, workers):
    """What is missing of a table's rows, and of those they start from."""
    flags_of, before = TABLES[which]
    results = rows.load_rewarded(RESULTS)
    jobs = {}
    for what in (TEACHER, *SEEDS):
        jobs[start(before, what, num)] = lambda threads, w=what: measure_start(before, w, num, threads)
    core = [title for title in (JOINTLY, ALONE) if title in flags_of]  # first: the claims rest on them
    others = [title for title in flags_of if title not in core]
    for part in (core, others):
        for seed in SEEDS:
            for flags in (flags_of[title] for title in part):
                jobs[name(flags, seed, num)] = lambda threads, f=flags, s=seed: measure(f, s, num, threads)
    if jobs.keys() - results.keys():
        threads = max(1, os.cpu_count() // workers)
        with ThreadPoolExecutor(workers) as pool:  # first, so that no two rows train the same one
            list(pool.map(lambda seed: stage1.student(seed, num, threads, before), SEEDS))
    rows.fill(RESULTS, results, jobs, workers)


def plot(results, num, path):
    """Reward and held-out accuracy over preference updates, joint and alone: each seed thin, their mean thick.

    A point is 64 held-out prompts.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for title, color in ((JOINTLY, "tab:blue"), (ALONE, "tab:red")):
        paths = [row["path"] for row in rows_of("table4", results, num).get(title, ())]
        for ax, measure_ in zip(axes, ("held_out_reward", "held_out_prompt_accuracy")):
            for run in paths:
                values = [p[measure_] for p in run]
                ax.plot([p["rl_updates"] for p in run], values, color=color, lw=0.7, alpha=0.5)
            if paths:
                means = [mean(p[measure_] for p in points) for points in zip(*paths)]
                updates = [p["rl_updates"] for p in paths[0]]
                ax.plot(updates, means, color=color, lw=2, label=title.split(" (")[0])
            named = measure_.replace("held_out_", "held-out ").replace("_", " ")
            ax.set(xlabel="preference updates", title=named)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(num=rows.NUM):
    """results/stage2.md, from the rows that are there."""
    results = rows.load_rewarded(RESULTS)
    table4 = rows_of("table4", results, num)
    return pages.joined(
        [
            INTRODUCTION.format(num=num),
            table("table4", results, num),
            "![reward and held-out accuracy over preference updates, joint and alone](../docs/table4.png)",
            pages.told(table4_text, table4),
            "## With 8 steps (Table 7)",
            table("table7", results, num),
            pages.told(table7_text, rows_of("table7", results, num)),
        ]
    )


INTRODUCTION = """
# Stage 2

`python -m lab.claims --only table4 table7` runs the rows that are missing in [claims.json](claims.json), and writes
this page and its plot; `--print` writes them from the rows that are there.

Stage 2 starts from each seed's stage-1 student: 300 preference updates and, beside them, distillation in the ratio that
the row names. The mean over seeds stands first, each seed's value behind it; {num} held-out prompts. The reward is R of
finished pictures, at t = 1; what is optimised is the same R at noisy candidates. No update sees what the other columns
measure; "prompts right" is the exact check of a picture against its prompt. The minutes include previews and held-out
measures, on cores shared with other runs, and say little; two runs were paused and have none.

## In the manner of Table 4
"""


def table4_text(table4):
    teacher, stage1_, joint, alone = (table4[title] for title in (TEACHER, STAGE1, JOINTLY, ALONE))
    noisy, unreal = table4[ALL_NOISE], table4[UNREAL]
    ratios = [table4[title] for title in (*RATIOS, ALONE)]
    real = stage1_[0]["real"]["saturation"]
    of_ratios = {m: ", ".join(figure(side, m) for side in ratios) for m in ("reward", "frechet", "prompt_accuracy")}
    return f"""
Joint training at 5:1 raises the reward from {figure(stage1_, "reward")} to {figure(joint, "reward")}
({errors(joint, stage1_, "reward")}), above the 50-step teacher's {figure(teacher, "reward")}. Prompts right are
{right(joint)} % for stage 1's {right(stage1_)} %, the recall is
{100 * average(joint, "recall") / average(stage1_, "recall"):.1f} % of stage 1's, the saturation
{figure(joint, "saturation")} for {figure(stage1_, "saturation")} (real scenes: {real:.3f}). The Fréchet distance
grows, {frechet(joint)} for {frechet(stage1_)} ({errors(joint, stage1_, "frechet")}): more reward is not more realism
here.

- **Joint against post-training (Table 4): realism seen, reward not seen.** Preference optimisation alone, with the same
  300 updates, gains more reward ({figure(alone, "reward")}) and pays for it with a Fréchet distance of
  {frechet(alone)} (joint: {frechet(joint)}). Prompts right are {right(alone)} % for the joint run's {right(joint)} %
  ({errors(joint, alone, "prompt_accuracy")}). In the paper the joint run has the higher reward too.
- **Ratios: 5:1 does not have the most reward.** From 1:1 over 2:1, 5:1 and 10:1 to preference optimisation alone the
  reward goes {of_ratios["reward"]}, the Fréchet distance {of_ratios["frechet"]}, and prompts right
  {of_ratios["prompt_accuracy"]} %. Every ratio up to 10:1 buys reward at about the same realism. 10:1 has more reward
  than 5:1 ({errors(ratios[3], joint, "reward")}); the paper's 5:1 has the most ImageReward of the four.
- **Noise levels: that the two noisiest steps give more reward is not seen.** With candidates at all three noisy
  transitions the reward is {figure(noisy, "reward")} for {figure(joint, "reward")} at the two noisiest
  ({errors(noisy, joint, "reward")}), and an update takes longer; the Fréchet distances are {frechet(noisy)} and
  {frechet(joint)}. In the paper all noise has less ImageReward (0.9421 for 0.9808) and more CLIP score, HPSv2 and MPS.
  A guess: this reward model is surest at little noise, and a third pair per rollout is half as much again to learn
  from.
- **Pixel-GAN in stage 2 (Fig. 7): within noise.** The Fréchet distance is {frechet(joint)} with it and
  {frechet(unreal)} without ({errors(joint, unreal, "frechet")}), the reward {figure(joint, "reward")} and
  {figure(unreal, "reward")}.
- `--rl-lr` was chosen with seed 0, beside 5e-6 and 2e-5, whose rows are not kept: a higher rate gains more reward and
  loses more realism.
"""


def table7_text(table7):
    stage1_, joint = table7[STAGE1], table7[JOINTLY8]
    return f"""
With 8 steps stage 2 gains reward too ({errors(joint, stage1_, "reward")}), and pays with the Fréchet distance again:
{frechet(joint)} for {frechet(stage1_)} ({errors(joint, stage1_, "frechet")}).
"""


def write(num):
    """The page and its plot."""
    pages.write("results/stage2.md", num, page(num))
    plot(rows.load_rewarded(RESULTS), num, rows.place("docs/table4.png", num))
