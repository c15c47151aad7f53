"""The paper's claims, measured on the toy world.

    python -m lab.claims --only table4      what is missing in results/claims.json; then the table as Markdown, and docs/table4.png
    python -m lab.claims --print            the tables and plots from what is there

Rows are cached by their flags, so an interrupted call goes on. Begun with Table 4 (stage 2); the other claims join here.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from config import Config
from lab import rows, stage1
from lab.stage1 import FULL, SEEDS

RESULTS = Path("results/claims.json")
RL_UPDATES = 300
SETTINGS = ("rl_ratio", "rl_steps", "candidates", "carry", "pair_threshold", "beta", "rl_lr", "gan_weight")
JOINT = {f"--{name.replace('_', '-')}": getattr(Config, name) for name in SETTINGS}
COLUMNS = ("reward", "prompt_accuracy", "clip_score", "frechet", "recall", "saturation", "minutes")

TABLE4 = {
    **{f"joint, {r}:1": JOINT | {"--rl-ratio": r} for r in (1, 2, 5, 10)},
    "RL alone (`--rl-only`)": JOINT | {"--rl-only": True},
    "joint, 5:1, all noise levels (`--rl-steps all`)": JOINT | {"--rl-steps": "all"},
    "joint, 5:1, without Pixel-GAN (`--gan-weight 0`)": JOINT | {"--gan-weight": 0},
}


def loops(flags):
    """--iterations counts updates of either kind."""
    return RL_UPDATES if "--rl-only" in flags else RL_UPDATES + RL_UPDATES // flags["--rl-ratio"]


def student(seed, num, threads):
    """The stage-1 run that stage 2 starts from: the one of lab.stage1's first row, trained here where it is not there."""
    out = rows.folder(stage1.name(FULL, seed, num))
    if not (out / "metrics.json").exists():
        stage1.measure(FULL, seed, num, threads)
    return out


def measure(flags, seed, num, threads):
    """One stage-2 run -> its metrics, minutes, and its held-out judges over the run."""
    out = rows.folder(name(flags, seed, num))
    settings = {
        "--iterations": loops(flags),
        "--init": student(seed, num, threads),
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


def measure_start(which, num, threads):
    """Stage 1 of a seed, or the teacher."""
    path = rows.folder(str(which)).with_suffix(".json")
    what = ("--teacher", "--steps", 50) if which == "teacher" else ("--run", student(which, num, threads))
    rows.command("evaluate.py", *what, "--num", num, "--json", path, threads=threads)
    return json.loads(path.read_text())


def start(which, num):
    """The row's name of a seed's stage 1, or of the teacher."""
    return f"{which if which == 'teacher' else f'stage 1, seed {which}'}, {num} prompts"


def name(flags, seed, num):
    return rows.key(flags, "--seed", seed, f"{num} prompts")


def table4(results, num):
    rows.head("Table 4", COLUMNS)
    table = {"teacher, 50 steps": [start("teacher", num)], "stage 1": [start(s, num) for s in SEEDS]}
    table |= {title: [name(flags, s, num) for s in SEEDS] for title, flags in TABLE4.items()}
    for title, names in table.items():
        if found := [results[n] for n in names if n in results]:
            rows.line(title, found, COLUMNS)


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


def main():
    args = rows.options(__doc__.split("\n")[0], ("table4",))
    results = rows.load(RESULTS, reward_crc32=rows.crc32("toy/lrm/unet/diffusion_pytorch_model.safetensors"))
    if not args.print:
        with ThreadPoolExecutor(args.jobs) as pool:  # first, so that no two rows train the same one
            list(pool.map(lambda s: student(s, args.num, max(1, os.cpu_count() // args.jobs)), SEEDS))
        starts = {start(w, args.num): w for w in ("teacher", *SEEDS)}
        rows.fill(RESULTS, results, {row: lambda threads, w=w: measure_start(w, args.num, threads) for row, w in starts.items()}, args.jobs)
        chosen = [(flags, seed) for seed in SEEDS for flags in TABLE4.values()]
        jobs = {name(f, s, args.num): lambda threads, f=f, s=s: measure(f, s, args.num, threads) for f, s in chosen}
        rows.fill(RESULTS, results, jobs, args.jobs)
    table4(results, args.num)
    plot(results, args.num)


if __name__ == "__main__":
    main()
