"""Stage 2's tables (Tables 4, 7, Fig. 7): joint training, its variants and preference optimisation alone, from lab.stage1's students.

python -m lab.claims --only table4 table7       what is missing in results/claims.json; the tables, and docs/table4.png
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from lab import rows, stage1
from lab.stage1 import FULL, SEEDS

RESULTS = Path("results/claims.json")
JOINT = FULL | stage1.spelt(("rl_ratio", "rl_steps", "candidates", "carry", "pair_threshold", "beta", "ratio_clip", "rl_lr"))
COLUMNS = ("reward", "prompt_accuracy", "clip_score", "frechet", "recall", "saturation", "minutes")
TEACHER, JOINTLY, ALONE = next(iter(stage1.BASELINES)), "joint, 5:1", "RL alone (`--rl-only`)"
ALL_NOISE, UNREAL = "joint, 5:1, all noise levels (`--rl-steps all`)", "joint, 5:1, without Pixel-GAN (`--gan-weight 0`)"
JOINTLY8 = "8 steps, joint, 5:1"

TABLE4 = {  # row -> flags
    **{f"joint, {r}:1": JOINT | {"--rl-ratio": r} for r in (1, 2, 5, 10)},
    ALONE: JOINT | {"--rl-only": True},
    ALL_NOISE: JOINT | {"--rl-steps": "all"},
    UNREAL: JOINT | {"--gan-weight": 0},
}
TABLE7 = {JOINTLY8: JOINT | {"--student-steps": 8}}
TABLES = {"table4": (TABLE4, FULL), "table7": (TABLE7, stage1.TABLES["students"][stage1.EIGHT][0])}  # and the stage 1 that its rows start from


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


def train(which, num, workers):
    """What is missing of a table's rows, and of those they start from."""
    table, before = TABLES[which]
    results = rows.load_rewarded(RESULTS)
    core = [t for t in (JOINTLY, ALONE) if t in table]  # first: the claims rest on them
    chosen = [(table[t], seed) for part in (core, [t for t in table if t not in core]) for seed in SEEDS for t in part]
    jobs = {start(before, w, num): lambda threads, w=w: measure_start(before, w, num, threads) for w in (TEACHER, *SEEDS)}
    jobs |= {name(f, s, num): lambda threads, f=f, s=s: measure(f, s, num, threads) for f, s in chosen}
    if jobs.keys() - results.keys():
        with ThreadPoolExecutor(workers) as pool:  # first, so that no two rows train the same one
            list(pool.map(lambda s: stage1.student(s, num, max(1, os.cpu_count() // workers), before), SEEDS))
    rows.fill(RESULTS, results, jobs, workers)


def plot(results, num, path):
    """Reward and held-out accuracy over RL updates, joint and RL alone: each seed thin, their mean thick. 64 held-out prompts a point."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for title, color in ((JOINTLY, "tab:blue"), (ALONE, "tab:red")):
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
    plt.close(figure)
