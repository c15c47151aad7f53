"""The README's stage-1 tables: trains and evaluates every row below as commands, and prints them as Markdown.

    python -m lab.stage1                    what is missing in results/stage1.json; --only main sweep to choose tables
    python -m lab.stage1 --print            the tables from what is there

A row is cached by its flags, so an interrupted call goes on; other teacher weights empty the cache. --jobs N runs N rows at a time, a
share of the cores each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock

from tqdm import tqdm

from config import Config

RESULTS, RUNS = Path("results/stage1.json"), Path("runs/lab")
SETTINGS = ("iterations", "batch_size", "ttur", "lr", "fake_lr", "d_lr", "ema", "gan_weight", "dm_steps", "clip_grad", "guidance")
FULL = {f"--{name.replace('_', '-')}": getattr(Config, name) for name in SETTINGS}  # the defaults, spelt out: they are part of a row's name
SHORT = FULL | {"--iterations": 200}
SEEDS = (0, 1, 2)

# table -> row -> (flags beside the defaults, seeds)
TABLES = {
    "main": {
        "Flash-DMD": (FULL, SEEDS),
        "pure DM, no Pixel-GAN (`--gan-weight 0`)": (FULL | {"--gan-weight": 0}, SEEDS),
        "no EMA pull (`--ema 1`)": (FULL | {"--ema": 1}, SEEDS),
    },
    "variants": {
        "pure DM at every step (`--gan-weight 0 --dm-steps all`)": (FULL | {"--gan-weight": 0, "--dm-steps": "all"}, (0,)),
        "reading (a) of Eq. 9 (`--adv-reading a`)": (FULL | {"--adv-reading": "a"}, (0,)),
        "renoise high (`--renoise 0.5,0.98`)": (FULL | {"--renoise": "0.5,0.98"}, (0,)),
        "renoise low (`--renoise 0.02,0.5`)": (FULL | {"--renoise": "0.02,0.5"}, (0,)),
    },
    "sweep": {
        "base": (SHORT, (0,)),
        **{f"`--ema {v}`": (SHORT | {"--ema": v}, (0,)) for v in (0.8, 0.95, 0.99)},
        **{f"`--gan-weight {v}`": (SHORT | {"--gan-weight": v}, (0,)) for v in (0.003, 0.03)},
        **{f"`--lr {v}`": (SHORT | {"--lr": v}, (0,)) for v in (1e-5, 4e-5)},
        **{f"`--fake-lr {v}`": (SHORT | {"--fake-lr": v}, (0,)) for v in (3e-5, 3e-4)},
    },
}


def key(flags, seed, num):
    return " ".join(f"{k} {v}" for k, v in sorted(flags.items())) + f" --seed {seed}, {num} prompts"


def run(script, *argv, threads):
    argv = [sys.executable, script, *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")


def measure(flags, seed, num, threads):
    """Train and evaluate one row with one seed -> its metrics, with seconds per loop and the last health signals."""
    out = RUNS / f"{zlib.crc32(key(flags, seed, num).encode()):08x}"
    run(
        "train.py",
        "--stage",
        1,
        "--out",
        out,
        "--overwrite",
        "--preview-every",
        0,
        "--seed",
        seed,
        *(x for kv in flags.items() for x in kv),
        threads=threads,
    )
    run("evaluate.py", "--run", out, "--num", num, "--json", out / "metrics.json", threads=threads)
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    metrics = json.loads((out / "metrics.json").read_text())
    shutil.rmtree(out)
    return metrics | {"seconds_per_loop": last["seconds"] / last["loops"], "score_lag": last["score_lag"], "skipped_updates": last["skipped_updates"]}


BASELINES = {
    "teacher, 50 steps": ("--teacher", "--steps", 50),
    "undistilled, 4 steps, guided": ("--undistilled", "--steps", 4),
    "undistilled, 4 steps, unguided": ("--undistilled", "--steps", 4, "--guidance", 1),
}


def measure_baseline(name, num, threads):
    path = RUNS / f"{zlib.crc32(name.encode()):08x}.json"
    run("evaluate.py", *BASELINES[name], "--num", num, "--json", path, threads=threads)
    return json.loads(path.read_text())


COLUMNS = ("prompt_accuracy", "frechet", "precision", "recall", "clip_score", "saturation", "contrast")


def line(name, results):
    """A row: the mean over seeds, and each seed's value behind it where there are several."""
    cells = []
    for column in COLUMNS:
        values = [r[column] for r in results]
        scale, digits = (100, 1) if column in ("prompt_accuracy", "precision", "recall") else (1, 3)
        shown = [f"{v * scale:.{digits}f}" for v in [mean(values), *values]]
        cells.append(shown[0] + (f" ({', '.join(shown[1:])})" if len(values) > 1 else ""))
    return f"| {name} | " + " | ".join(cells) + " |"


def table(results, name, num):
    print(f"\n| {name} | prompts right, % | Fréchet | precision, % | recall, % | CLIP | saturation | contrast |")
    print("| --- |" + " --- |" * len(COLUMNS))
    if name == "main":
        for label in BASELINES:
            if label in results["baselines"]:
                print(line(label, [results["baselines"][label]]))
        if results["baselines"]:
            real = next(iter(results["baselines"].values()))["real"]
            print(f"| real scenes | | | | | | {real['saturation']:.3f} | {real['contrast']:.3f} |")
    for label, (flags, seeds) in TABLES[name].items():
        found = [results["rows"][key(flags, s, num)] for s in seeds if key(flags, s, num) in results["rows"]]
        if found:
            print(line(label, found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--num", type=int, default=1000, help="held-out prompts per row")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--print", action="store_true", help="print the tables and train nothing")
    args = parser.parse_args()
    weights = zlib.crc32(Path(Config.model, "unet/diffusion_pytorch_model.safetensors").read_bytes())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if results.get("teacher_crc32") != weights:
        results = {"teacher_crc32": weights, "baselines": {}, "rows": {}}
    if not args.print:
        RESULTS.parent.mkdir(exist_ok=True)
        threads, lock = max(1, os.cpu_count() // args.jobs), Lock()
        jobs = {("baselines", name): (measure_baseline, name) for name in BASELINES if "main" in args.only}
        jobs |= {("rows", key(f, s, args.num)): (measure, f, s) for t in args.only for f, seeds in TABLES[t].values() for s in seeds}
        missing = {where: job for where, job in jobs.items() if where[1] not in results[where[0]]}
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), desc="rows") as bar:

            def one(where, job):
                measured = job[0](*job[1:], args.num, threads)
                with lock:
                    results[where[0]][where[1]] = measured
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    bar.update()

            for done in [pool.submit(one, *entry) for entry in missing.items()]:
                done.result()
    for name in args.only:
        table(results, name, args.num)


if __name__ == "__main__":
    main()
