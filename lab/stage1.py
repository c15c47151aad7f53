"""The README's stage-1 tables: trains and evaluates every row below, and prints them as Markdown.

    python -m lab.stage1                    what is missing in results/stage1.json; --only main sweep to choose tables
    python -m lab.stage1 --print            the tables from what is there

Rows are cached by their flags, so an interrupted call goes on; other teacher weights empty the cache.
"""

import json
from pathlib import Path

from engine.config import PRESETS, Config
from lab import rows

RESULTS = Path("results/stage1.json")
SETTINGS = """iterations batch_size student_steps ttur lr fake_lr d_lr lr_schedule weight_decay clip_grad
    ema guidance renoise dm_steps gan_weight gan_loss gan_reals adv_reading""".split()


def spelt(names, preset="toy"):
    """These settings of a preset as flags: they are part of a row's name, so a changed preset is another row."""
    config = Config(**PRESETS[preset])
    values = {name: getattr(config, name) for name in names}
    return {f"--{name.replace('_', '-')}": ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in values.items()}


FULL = spelt(SETTINGS)
DMD2 = spelt((*SETTINGS, "gan", "critic_weight"), "dmd2")
SHORT = DMD2 | {"--iterations": 800}
CONSTANT = {"--lr": 3e-5, "--fake-lr": 2e-4, "--lr-schedule": "constant"}
SD3 = {"--model": "toy/sd3"}
LONGER = FULL | SD3 | {"--guidance": 2.0, "--ttur": 2, "--iterations": 600}
SEEDS = (0, 1, 2)
UNSEEN = "no Pixel-GAN, so no loss at the last step (`--gan-weight 0`)"
PURE, UNPULLED = "pure DM, at every step (`--gan-weight 0 --dm-steps all`)", "no EMA pull (`--ema 1`)"
EVERY_STEP, EIGHT = "DM loss at every step (`--dm-steps all`)", "8 steps (`--student-steps 8`)"
HIGH_NOISE, LOW_NOISE = "renoise high (`--renoise 0.5,0.98`)", "renoise low (`--renoise 0.02,0.5`)"

# table -> row -> (flags, seeds)
TABLES = {
    "main": {
        "Flash-DMD": (FULL, SEEDS),
        UNSEEN: (FULL | {"--gan-weight": 0}, SEEDS),
        PURE: (FULL | {"--gan-weight": 0, "--dm-steps": "all"}, SEEDS),
        UNPULLED: (FULL | {"--ema": 1}, SEEDS),
    },
    "variants": {
        EVERY_STEP: (FULL | {"--dm-steps": "all"}, SEEDS),
        "reading (a) of Eq. 9 (`--adv-reading a`)": (FULL | {"--adv-reading": "a"}, (0,)),
        HIGH_NOISE: (FULL | {"--renoise": "0.5,0.98"}, SEEDS),
        LOW_NOISE: (FULL | {"--renoise": "0.02,0.5"}, SEEDS),
    },
    "sweep": {
        **{f"`--ema {v}`": (FULL | {"--ema": v}, (0,)) for v in (0.8, 0.97)},
        "`--lr 3e-5 --fake-lr 2e-4 --lr-schedule constant`": (FULL | CONSTANT, (1, 2)),
        "`--lr 3e-5 --fake-lr 2e-4 --lr-schedule constant --gan-weight 0.1`": (FULL | CONSTANT | {"--gan-weight": 0.1}, (2,)),
        "`--lr 3e-5 --fake-lr 2e-4 --lr-schedule constant --guidance 5`": (FULL | CONSTANT | {"--guidance": 5.0}, (1, 2)),
    },
    "students": {
        EIGHT: (FULL | {"--student-steps": 8}, SEEDS),
        "LoRAs of rank 16 (`--lora-rank 16 --lr 4e-4 --fake-lr 3e-3`)": (FULL | {"--lora-rank": 16, "--lr": 4e-4, "--fake-lr": 3e-3}, SEEDS),
    },
    "sd3": {
        "SD3 student (`--model toy/sd3 --guidance 2.0 --ttur 2 --iterations 600`)": (LONGER, SEEDS),
        "the same as LoRAs (`--lora-rank 16 --lr 1e-3 --fake-lr 3e-3`)": (LONGER | {"--lora-rank": 16, "--lr": 1e-3, "--fake-lr": 3e-3}, SEEDS),
    },
    "sd3-sweep": {
        "SDXL's settings (the defaults)": (FULL | SD3, (0,)),
        "`--lr 2e-5 --fake-lr 6e-4`": (FULL | SD3 | {"--lr": 2e-5, "--fake-lr": 6e-4}, (0,)),
        "`--ttur 2 --iterations 600`": (FULL | SD3 | {"--ttur": 2, "--iterations": 600}, (0,)),
        "`--dm-steps all`": (FULL | SD3 | {"--dm-steps": "all"}, (0,)),
        **{f"`--guidance {w}`": (FULL | SD3 | {"--guidance": w}, (0,)) for w in (1.5, 2.0)},
    },
    "dmd2-sweep": {  # as many runs as Flash-DMD's sweep. Chosen: of those better than the default in Fréchet and prompts right, the best Fréchet
        "DMD2's settings (`--preset dmd2 --iterations 800`)": (SHORT, (0,)),
        **{f"`--lr {g:g} --fake-lr {f:g}`": (SHORT | {"--lr": g, "--fake-lr": f}, (0,)) for g, f in ((2e-5, 3e-4), (4e-5, 6e-4), (1e-4, 4e-4))},
        "`--lr 3e-5 --fake-lr 2e-4 --lr-schedule constant`": (SHORT | CONSTANT, (0,)),
        **{f"`--gan-weight {v}`": (SHORT | {"--gan-weight": v}, (0,)) for v in (0.001, 0.02)},
        "`--guidance 5`": (SHORT | {"--guidance": 5.0}, (0,)),
    },
}
SCALES = (Config.teacher_guidance, Config.guidance, 1.0)
SD3_SCALES = (Config.teacher_guidance, Config.guidance)
BASELINES = {f"teacher, 50 steps, w = {w:g}": ("--teacher", "--steps", 50, "--guidance", w) for w in SCALES[:2]}
BASELINES |= {f"undistilled, 4 steps, w = {w:g}": ("--undistilled", "--steps", 4, "--guidance", w) for w in SCALES}
SD3_BASELINES = {f"SD3 teacher, 50 steps, w = {w:g}": (*rows.flat(SD3), "--teacher", "--steps", 50, "--guidance", w) for w in SD3_SCALES}
SD3_BASELINES |= {f"SD3 undistilled, 4 steps, w = {w:g}": (*rows.flat(SD3), "--undistilled", "--steps", 4, "--guidance", w) for w in SD3_SCALES}
BASELINES_OF = {"main": BASELINES, "sd3": SD3_BASELINES}
COLUMNS = ("prompt_accuracy", "frechet", "precision", "recall", "clip_score", "saturation", "contrast")


def name(flags, seed, num):
    return rows.key(flags, "--seed", seed, f"{num} prompts", *which_sd3("--model" in flags))


def baseline_name(title, num):
    return ", ".join([title, f"{num} prompts", *which_sd3(title in SD3_BASELINES)])


def which_sd3(asked):
    """Other weights of toy/sd3 are other rows; those of toy/sdxl empty the cache (lab/rows.py)."""
    weights = Path("toy/sd3/transformer/diffusion_pytorch_model.safetensors")
    return [f"sd3 {rows.crc32(weights):08x}"] if asked and weights.exists() else []


def measure(flags, seed, num, threads):
    """Train and evaluate one row with one seed -> its metrics, with seconds per loop and the last health signals. The run stays in runs/lab."""
    out = rows.folder(name(flags, seed, num))
    rows.command("train.py", "--stage", 1, "--out", out, "--overwrite", "--preview-every", 0, "--seed", seed, *rows.flat(flags), threads=threads)
    rows.command("evaluate.py", "--run", out, "--num", num, "--json", out / "metrics.json", threads=threads)
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics | {"seconds_per_loop": last["seconds"] / last["loops"], "score_lag": last["score_lag"], "skipped_updates": last["skipped_updates"]}


def student(seed, num, threads, flags=FULL):
    """The run of a row with a seed, which stage 2 starts from; trained here where it is not there."""
    out = rows.folder(name(flags, seed, num))
    if not (out / "metrics.json").exists():
        measure(flags, seed, num, threads)
    return out


def measure_baseline(title, num, threads):
    path = rows.folder(title).with_suffix(".json")
    rows.command("evaluate.py", *(BASELINES | SD3_BASELINES)[title], "--num", num, "--json", path, threads=threads)
    return json.loads(path.read_text())


def table(results, which, num):
    rows.head(which, COLUMNS)
    if which in BASELINES_OF:
        found = {title: results[n] for title in BASELINES_OF[which] if (n := baseline_name(title, num)) in results}
        for title, measured in found.items():
            rows.line(title, [measured], COLUMNS)
        for measured in list(found.values())[:1]:
            rows.line("real scenes", [measured["real"]], COLUMNS)
    for title, (flags, seeds) in TABLES[which].items():
        if found := [results[name(flags, s, num)] for s in seeds if name(flags, s, num) in results]:
            rows.line(title, found, COLUMNS)


def train(tables, num, workers):
    """What is missing of these tables."""
    baselines = [title for which in tables for title in BASELINES_OF.get(which, ())]
    jobs = {baseline_name(title, num): lambda threads, title=title: measure_baseline(title, num, threads) for title in baselines}
    chosen = [(flags, seed) for t in tables for flags, seeds in TABLES[t].values() for seed in seeds]
    jobs |= {name(f, s, num): lambda threads, f=f, s=s: measure(f, s, num, threads) for f, s in chosen}
    rows.fill(RESULTS, rows.load(RESULTS), jobs, workers)


def main():
    args = rows.options(__doc__.split("\n")[0], TABLES)
    if not args.print:
        train(args.only, args.num, args.jobs)
    results = rows.load(RESULTS)
    for which in args.only:
        table(results, which, args.num)


if __name__ == "__main__":
    main()
