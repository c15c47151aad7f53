"""What doctor.py knows of healthy runs, and its gallery of failures: toy runs of minutes, healthy and sick on purpose.

    python -m lab.health                   trains what is not recorded yet, in runs/health; then all that follows
    python -m lab.health --only blind      trains that run anew
    python -m lab.health --print           from the records alone: bands, pictures and tables

results/health/NAME    a run's settings, curves and newest preview, which doctor.py reads as it reads a run folder
toy/bands.json         where the signals of the REFERENCES lie, in every tenth of a run
docs/health/NAME.png   doctor.py's picture of a run
docs/health.md         between its marks: the rules, and what they find in all other runs, whose seeds set no limit
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev

import torch
from PIL import Image
from tqdm import tqdm

from engine import data, doctor, run_log
from engine.config import Config
from engine.pictures import to_pil
from engine.run_folder import newest
from toy import world

RUNS, RECORDS, PICTURES = Path("runs/health"), Path("results/health"), Path("docs/health")
PAGE = Path("docs/health.md")
TENTHS, REACH = 10, 0.2  # a band's steps, and how far around a step's middle it takes values
WIDTH = 1.5  # standard deviations of single values that a band reaches to each side
COLORS = 128  # of a picture

LONG = "--batch-size 8 --iterations 200 --gan-crop 32 --lr 6e-5 --fake-lr 4e-4"
SHORT = "--batch-size 4 --gan-crop 32 --log-every 2 --preview-every 12 --lr 8e-5 --fake-lr 5e-4"
JOINT = f"--stage 2 --init {RUNS / 'sdxl-0'} --batch-size 4 --gan-crop 32 --log-every 2 --lr 3e-5 --fake-lr 3e-4"
JOINT = f"{JOINT} --rl-lr 5e-6 --rl-ratio 1 --iterations 24 --preview-every 12"
SD3 = "--model toy/sd3 --guidance 2 --ttur 2 --batch-size 8 --gan-crop 32 --log-every 2 --iterations 48"
SD3 = f"{SD3} --lr 8e-5 --fake-lr 5e-4 --preview-every 0"

LONG_SD3 = (
    "--model toy/sd3 --guidance 2 --ttur 2 --batch-size 8 --iterations 120 --gan-crop 32 --lr 6e-5 --fake-lr 4e-4"
)
AFTER = f"--stage 2 --init {RUNS}/sdxl-{{}} --batch-size 16 --gan-crop 32 --lr 3e-5 --fake-lr 3e-4"
AFTER = f"{AFTER} --rl-lr 5e-6 --rl-ratio 1 --iterations 72 --preview-every 0"
HACK = f"--stage 2 --init {RUNS / 'sdxl-0'} --batch-size 8 --rl-only --rl-lr 4e-4 --beta 1e-3 --gan-crop 32"
HACK = f"{HACK} --log-every 1 --iterations 24 --preview-every 4"
COMMON = {"SHORT": SHORT, "JOINT": JOINT, "SD3": SD3}
GRAINY = RUNS / "grainy-pictures"  # drawn by grain()

Made = namedtuple("Made", "disease flags how", defaults=["", "", ""])

REFERENCES = {  # name: flags
    **{f"sdxl-{seed}": f"{LONG} --preview-every 0 --seed {seed}" for seed in (0, 1, 2)},
    **{f"sd3-{seed}": f"{LONG_SD3} --preview-every 0 --seed {seed}" for seed in (1, 2, 3)},
    **{f"joint-{seed}": f"{AFTER.format(seed)} --seed {seed}" for seed in (0, 1, 2)},
}
GALLERY = {
    "healthy": Made("", f"{SHORT} --seed 10 --iterations 36", "stage 1"),
    "healthy-2": Made("", f"{SHORT} --seed 11 --iterations 16 --log-every 1 --preview-every 0", "stage 1"),
    "healthy-joint": Made("", f"{JOINT} --seed 10", "stage 2"),
    "healthy-sd3": Made("", f"{SD3} --seed 0", "stage 1 of SD3"),
    "nan": Made(
        "NaN skips",
        f"{SHORT} --seed 10 --iterations 24 --gan-weight 1e39",
        "a weight of Eq. 9 beyond the largest number of fp32",
    ),
    "never": Made(
        "G never moved",
        f"{SHORT} --seed 10 --iterations 12 --log-every 1 --preview-every 6 --lr 1e-12",
        "steps of G below what fp32 can add to a weight",
    ),
    "hot": Made(
        "rates too high",
        f"{SHORT} --seed 10 --iterations 24 --lr 5e-3 --fake-lr 2e-2",
        "rates 60 and 40 times as high",
    ),
    "lagging": Made(
        "score estimator lagging",
        f"{SHORT} --seed 10 --iterations 24 --lr 3e-4 --fake-lr 1e-9 --ema 1",
        "a score estimator that stands still while G moves fast",
    ),
    "grainy": Made(
        "D too strong",
        f"{SHORT} --seed 10 --iterations 24 --data {GRAINY}",
        "real pictures with a camera's grain, which the VAE cannot draw",
    ),
    "blind": Made("D blind", f"{SHORT} --seed 10 --iterations 24 --d-lr 1e-9", "a D that does not learn"),
    "drifting": Made(
        "over-saturation",
        f"{SHORT} --seed 10 --iterations 12 --log-every 1 "
        "--lr 3e-4 --lr-schedule constant --guidance 40 --gan-weight 0",
        "guidance 13 times as high, and no GAN",
    ),
    "guided": Made(
        "diversity falling", f"{SHORT} --seed 10 --iterations 24 --lr 3e-4 --guidance 40", "guidance 13 times as high"
    ),
    "hacked": Made("reward hacking", f"{HACK} --seed 10", "preference updates alone, 40 times as fast, barely held"),
    "gate": Made(
        "RL gate never open",
        f"{SHORT} --seed 10 --iterations 12 --log-every 1 --method advdmd --ttur 1 --rl-after 0 --rl-gate 1",
        "a gate that opens where D makes no mistake",
    ),
}
SHOWN = ["healthy", *(name for name, made in GALLERY.items() if made.disease)]  # with their pictures
ALWAYS = "method stage model data iterations".split()  # settings that a record names though they are the defaults
PATHS = "out init reward t5 preset resume overwrite save_every".split()  # settings that say nothing of the curves
DROPPED = "samples passes ranks seconds memory_gb".split()  # counters that no rule reads
BANDED = [  # signals that have bands
    *"score_lag dm_loss d_accuracy d_loss_ratio saturation_ratio contrast_ratio latent_std_ratio g_norm".split(),
    *"kl_to_reference kept_pairs implicit_accuracy".split(),
]


# ------------------------------------------------------------------------------------------------ training


def flags_of(name):
    return REFERENCES.get(name) or GALLERY[name].flags


def grain(folder, n=64, std=0.7):
    """n scenes of the toy world with their captions, in noise of `std` (pixels are in [-1, 1])."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes, rng = data.source("toy", world.SIZE), torch.Generator().manual_seed(0)
    for i in range(n):
        image, prompt, _ = scenes[i]
        to_pil(image + std * torch.randn(image.shape, generator=rng)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(prompt)


def train(name):
    """Train a run, in RUNS / name. Raises RuntimeError where it fails otherwise than its disease makes it."""
    argv = [sys.executable, "train.py", *shlex.split(flags_of(name)), "--out", str(RUNS / name), "--overwrite"]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode and "non-finite" not in done.stderr:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")


def record(name):
    """Keep of a run's folder what doctor.py reads: settings that differ from the defaults, curves without clocks."""
    run = run_log.read(RUNS / name)
    defaults = json.loads(json.dumps(vars(Config()) | {"rl_after": 0}))
    config = {k: v for k, v in run.config.items() if k in ALWAYS or k not in PATHS and defaults.get(k) != v}
    folder = RECORDS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rows = [
        {k: short(v) for k, v in row.items() if k not in (*DROPPED, *run_log.RATIOS, "d_loss_ratio")}
        for row in run.rows
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name in GALLERY:
        for old in folder.glob("preview-*.png"):
            old.unlink()
        for preview in sorted((RUNS / name).glob("preview-*.png"))[-1:]:
            shrink(preview, folder / preview.name)


def shrink(path, smaller):
    """Write a picture in COLORS colours: a third of its bytes."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(COLORS, kmeans=4)  # without kmeans rare colours are lost
    few.save(smaller, optimize=True)


def short(value):
    """Four significant digits, of whole numbers all."""
    return int(value) if value.is_integer() else float(f"{value:.4g}")


# --------------------------------------------------------------------------------------------------- bands


def bands():
    """{kind of run: {signal: {"low": [], "high": []}}} from the records of the REFERENCES, in tenths of a run."""
    kinds = {}
    for name in REFERENCES:
        run = run_log.read(RECORDS / name)
        kinds.setdefault(run_log.kind(run.config), []).append(run)
    return {kind: {s: band(runs, s) for s in BANDED if runs[0].points(s)} for kind, runs in kinds.items()}


def band(runs, signal):
    """A signal's mean less and plus WIDTH standard deviations, of all values within REACH of each tenth's middle."""
    log, exp = (float, float) if signal in run_log.LINEAR else (math.log, math.exp)
    points = [(p, log(v)) for run in runs for p, v in run.points(signal)]
    low, high = [], []
    for i in range(TENTHS):
        middle = (i + 0.5) / TENTHS
        values = [v for p, v in points if abs(p - middle) <= REACH]
        low.append(short(exp(mean(values) - WIDTH * pstdev(values))))
        high.append(short(exp(mean(values) + WIDTH * pstdev(values))))
    return {"low": low, "high": high}


# ---------------------------------------------------------------------------------------------------- page


def found(name, bands=True):
    """What the doctor finds in a record. bands: also by the limits of healthy toy runs."""
    run = run_log.read(RECORDS / name)
    return doctor.examine(run if bands else replace(run, bands={}))


def signs():
    """The rules as a Markdown table: disease, sign, remedy."""
    rows = [f"| {name} | {rule.__doc__} | {code(remedy)} |" for name, (rule, remedy) in doctor.DISEASES.items()]
    return ["| disease | sign | remedy |", "| --- | --- | --- |", *rows]


def code(text):
    """Flags set as code."""
    return re.sub(r"--[a-z-]+( vae| dmd2)?", r"`\g<0>`", text)


def matrix():
    """Disease made x diseases found, as a Markdown table, and a line with its sums."""
    names = list(doctor.DISEASES)
    head = [
        "| made \\ found | " + " | ".join(str(i + 1) for i in range(len(names))) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    lines = []
    for name, made in GALLERY.items():
        seen = {f.disease for f in found(name)}
        title = f"{names.index(made.disease) + 1}. {made.disease}" if made.disease else f"none, {made.how}"
        marks = ["" if d not in seen else "**found**" if d == made.disease else "also" for d in names]
        lines.append(f"| {title} (`{name}`) | " + " | ".join(marks) + " |")
    return [*head, *lines, "", f"{sums(True)} By the limits that hold for any model alone: {sums(False)}"]


def sums(bands):
    """How many of the gallery's diseases are found, and in which of its healthy runs something is: a sentence each."""
    seen = {name: {f.disease for f in found(name, bands)} for name in GALLERY}
    sick = [name for name, made in GALLERY.items() if made.disease]
    right = sum(GALLERY[name].disease in seen[name] for name in sick)
    wrong = [f"{', '.join(seen[name])} (`{name}`)" for name in GALLERY if name not in sick and seen[name]]
    healthy = len(GALLERY) - len(sick)
    told = f"{right} of {len(sick)} diseases are found; nothing is in {healthy - len(wrong)} of {healthy} healthy runs"
    return f"{told}{', but ' if wrong else ''}{', '.join(wrong)}."


def entry(name):
    """A run's section: how it was made, what the doctor says, its picture."""
    made = GALLERY[name]
    flags = made.flags
    for word, value in COMMON.items():
        flags = flags.replace(value, f"${word}")
    said = [f"> {line}" for line in map(doctor.sentence, found(name))] or ["> healthy"]
    said = [line for pair in zip(said, [">"] * len(said)) for line in pair]
    title = made.disease or f"healthy: {made.how}"
    picture = [f"![{name}](health/{name}.png)", ""] if name in SHOWN else []
    return [
        f"### {title[0].upper()}{title[1:]}",
        "",
        f"`{name}`: {made.how}." if made.disease else f"`{name}`.",
        "",
        f"    python train.py {flags}",
        "",
        *said[:-1],
        "",
        *picture,
    ]


def page():
    """docs/health.md with both of its written parts renewed."""
    common = [f'    {word}="{value}"' for word, value in COMMON.items()]
    shown = [line for name in GALLERY for line in entry(name)]
    parts = {"rules": signs(), "gallery": [*matrix(), "", *common, "", *shown[:-1]]}
    text = PAGE.read_text()
    for part, lines in parts.items():
        start, end = f"<!-- {part}: written by python -m lab.health -->", f"<!-- end of {part} -->"
        before, rest = text.split(start)
        text = "\n".join([before + start, "", *lines, "", end + rest.split(end)[1]])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*REFERENCES, *GALLERY]
    parser.add_argument("--only", nargs="+", choices=names, help="train these runs anew")
    parser.add_argument("--print", action="store_true", help="train nothing")
    args = parser.parse_args()
    missing = [name for name in names if not (RECORDS / name).is_dir()]
    for name in tqdm([] if args.print else args.only or missing, desc="runs"):
        before = re.search(rf"--init {RUNS}/(\S+)", flags_of(name))
        if before and newest(RUNS / before[1]) is None:
            train(before[1])
        if str(GRAINY) in flags_of(name):
            grain(GRAINY)
        train(name)
        record(name)
    run_log.BANDS.write_text(json.dumps(bands(), indent=1) + "\n")
    from engine.curves import draw

    PICTURES.mkdir(exist_ok=True)
    for name in SHOWN:
        run = run_log.read(RECORDS / name)
        draw(run, doctor.examine(run), PICTURES / f"{name}.png")
        shrink(PICTURES / f"{name}.png", PICTURES / f"{name}.png")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
