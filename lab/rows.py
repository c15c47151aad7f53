"""Rows of the README's tables: train.py and evaluate.py run as commands, their metrics cached in one JSON file by their flags."""

import argparse
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock

from tqdm import tqdm

from engine.config import Config, at_least

RUNS = Path("runs/lab")
NUM = 1000  # held-out prompts per row of the results that are kept
HEADINGS = {
    "samples": "samples",
    "variation": "RMS difference",
    "prompt_accuracy": "prompts right, %",
    "frechet": "Fréchet",
    "precision": "precision, %",
    "recall": "recall, %",
    "clip_score": "CLIP",
    "reward": "reward",
    "saturation": "saturation",
    "contrast": "contrast",
    "rl_open": "RL open, %",
}
PERCENT = ("prompt_accuracy", "precision", "recall", "rl_open")


def command(script, *argv, threads):
    """Run one of our scripts. Raises RuntimeError with the end of what it printed where it fails."""
    argv = [sys.executable, script, *map(str, argv)]
    done = subprocess.run(argv, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")


def flat(flags):
    """{"--lr": 1e-5} -> ["--lr", 1e-5]; a switch has the value True."""
    return [part for k, v in flags.items() for part in ((k,) if v is True else (k, v))]


def key(flags, *rest):
    """What a row is cached by."""
    return " ".join([*map(str, flat(dict(sorted(flags.items())))), *map(str, rest)])


def crc32(*path):
    return zlib.crc32(Path(*path).read_bytes())


def teacher_crc32():
    return crc32(Config.model, "unet/diffusion_pytorch_model.safetensors")


def folder(key):
    """A run folder of its own for a row with this teacher."""
    return RUNS / f"{zlib.crc32(key.encode(), teacher_crc32()):08x}"


def load(path, **weights):
    """The cache: {row: metrics}; empty where a network of the toy's, or another of `weights` (name -> crc32), is not the one it was made with."""
    weights = {
        "teacher_crc32": teacher_crc32(),
        "vae_crc32": crc32(Config.model, "vae/diffusion_pytorch_model.safetensors"),
        "sam_crc32": crc32(Config.sam, "image_encoder.safetensors"),
        "clip_crc32": crc32(Config.clip, "model.safetensors"),
        **weights,
    }
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if weights.items() <= found.items() else weights


def load_rewarded(path):
    """The cache of rows that rest on the toy's latent reward model as well."""
    return load(path, reward_crc32=crc32("toy/lrm/unet/diffusion_pytorch_model.safetensors"))


def place(path, num):
    """Where a table or plot of rows of `num` prompts goes: `path`, or beside the runs where it is a look at fewer prompts."""
    if num == NUM:
        return Path(path)
    RUNS.mkdir(parents=True, exist_ok=True)
    return RUNS / Path(path).name


def fill(path, results, jobs, workers):
    """Run what is missing. jobs: {row: function(threads) -> metrics}; `workers` at a time, each with its share of the cores."""
    path.parent.mkdir(exist_ok=True)
    threads, lock = max(1, os.cpu_count() // workers), Lock()
    missing = {row: job for row, job in jobs.items() if row not in results}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(missing), desc=path.stem, disable=not missing) as bar:

        def one(row, job):
            measured = job(threads)
            with lock:
                results[row] = measured
                path.write_text(json.dumps(results, indent=1) + "\n")
                bar.update()

        for done in [pool.submit(one, *entry) for entry in missing.items()]:
            done.result()


def options(description, tables, quick=False):
    """The command line of a module of tables; with `quick`, of one that has a short way too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--num", type=at_least(8), default=NUM, help="held-out prompts per row")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="rows at a time, each with its share of the cores")
    parser.add_argument("--print", action="store_true", help="print the tables and train nothing")
    if quick:
        parser.add_argument("--quick", action="store_true", help="the core rows alone, short")
    return parser.parse_args()


def head(title, columns):
    """The first two lines of a Markdown table."""
    print(f"\n| {title} | " + " | ".join(HEADINGS.get(c, c) for c in columns) + " |")
    print("| --- |" + " --- |" * len(columns))


def line(title, found, columns):
    """A row of it: the mean over seeds, and each seed's value behind it where there are several."""
    cells = []
    for column in columns:
        values = [r[column] for r in found if r.get(column) is not None]
        scale, digits = (100, 1) if column in PERCENT else (1, 0 if column == "samples" else 3)
        values = values[:1] if column == "samples" else values  # the same with every seed
        shown = [f"{v * scale:.{digits}f}" for v in [mean(values), *values]] if values else [""]
        cells.append(shown[0] + (f" ({', '.join(shown[1:])})" if len(values) > 1 else ""))
    print(f"| {title} | " + " | ".join(cells) + " |")
