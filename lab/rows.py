"""Rows of results/*.json: train.py and evaluate.py run as commands, and their metrics are kept by their flags."""

import argparse
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from engine.config import PRESETS, Config
from engine.flags import at_least
from siblings import settings_of

RUNS = Path("runs/lab")
NUM = 1000  # held-out prompts per row of the results that are kept
SEEDS = (0, 1, 2)


def settings(preset):
    """The settings of a preset, with every setting of its method."""
    values = PRESETS[preset]
    return settings_of(values.get("method", "flash"))(**values)


def command(script, *argv, threads):
    """Run one of our scripts. Raises RuntimeError with the end of what it printed where it fails."""
    argv = [sys.executable, script, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")


def flat(flags):
    """{"--lr": 1e-5} -> ["--lr", 1e-5]; a switch has the value True."""
    parts = []
    for flag, value in flags.items():
        parts += [flag] if value is True else [flag, value]
    return parts


def key(flags, *rest):
    """What a row is cached by: its flags sorted by name, then the rest."""
    parts = flat(dict(sorted(flags.items())))
    return " ".join(map(str, [*parts, *rest]))


def crc32(*path):
    return zlib.crc32(Path(*path).read_bytes())


def teacher_crc32():
    return crc32(Config.model, "unet/diffusion_pytorch_model.safetensors")


def folder(key):
    """A run folder of its own for a row with this teacher."""
    return RUNS / f"{zlib.crc32(key.encode(), teacher_crc32()):08x}"


def load(path, **weights):
    """The cache: {row: metrics}. It is empty where one of the toy's networks is not that which the rows were made with.

    weights: {name: crc32} of further networks that the rows rest on.
    """
    weights = {
        "teacher_crc32": teacher_crc32(),
        "vae_crc32": crc32(Config.model, "vae/diffusion_pytorch_model.safetensors"),
        "sam_crc32": crc32(Config.sam, "image_encoder.safetensors"),
        "clip_crc32": crc32(Config.clip, "model.safetensors"),
        **weights,
    }
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if weights.items() <= found.items() else weights


def load_rewarded(path, **weights):
    """The cache of rows that rest on the toy's latent reward model as well."""
    return load(path, reward_crc32=crc32("toy/lrm/unet/diffusion_pytorch_model.safetensors"), **weights)


def place(path, num):
    """Where a page or plot of rows of `num` prompts goes: `path`, but beside the runs where `num` is not NUM."""
    if num == NUM:
        return Path(path)
    RUNS.mkdir(parents=True, exist_ok=True)
    return RUNS / Path(path).name


def fill(path, results, jobs, workers):
    """Run the rows that are missing, `workers` at a time, each with its share of the cores.

    jobs: {row: function(threads) -> metrics}.
    """
    path.parent.mkdir(exist_ok=True)
    threads = max(1, os.cpu_count() // workers)
    lock = Lock()
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


def options(description, parts, quick=False, seeds=False):
    """The command line of a module whose rows come in `parts`.

    With `quick`, of one that has a short way too; with `seeds`, of one that can take some of the seeds alone.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="run the rows of these parts")
    parser.add_argument("--num", type=at_least(8), default=NUM, help="held-out prompts per row")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="rows at a time, each with its share of the cores")
    parser.add_argument("--print", action="store_true", help="write from the rows that are there, and train nothing")
    if quick:
        parser.add_argument("--quick", action="store_true", help="train short runs of the core rows only")
    if seeds:
        which = {"nargs": "+", "type": int, "choices": SEEDS, "default": list(SEEDS)}
        parser.add_argument("--seeds", **which, help="run these seeds")
    return parser.parse_args()
