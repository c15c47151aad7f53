"""Students of 1, 2, 4 and 8 steps of the toy's SDXL and SD3; stage 2 on SD3; AdvDMD in 2 steps, DMDR in 1.

    python -m lab.steps                               the missing runs, then results/steps.md and docs/steps.png
    python -m lab.steps --only sdxl-1 sd3-1 --seeds 0     these rows and seeds alone, then page and picture
    python -m lab.steps --print                       page and picture from the runs that are there; trains nothing

Runs are short, as lab.demo's stage 1 is, and take one thread each. One that is finished is not done again, one that was
stopped goes on, and one that another call of this command is at is left to it: several calls share the work.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from diffusion import guided
from engine import locks, run_folder
from engine.config import Config
from engine.errors import UserError
from engine.models import load_denoiser, load_vae
from engine.pictures import generate, in_steps, save_grid
from engine.prompts import load_encoder
from lab import pages, rows, siblings, stage1
from lab.pages import errors, figure, frechet, right
from lab.rows import SEEDS
from lab.stage1 import FULL
from siblings import advdmd
from toy import world

RESULTS = Path("results/steps.json")
STEPS = (1, 2, 4, 8)
RATES = {"--batch-size": 8, "--lr": "6e-5", "--fake-lr": "4e-4"}
SHORT = RATES | {"--iterations": 160, "--gan-crop": 32}
SD3 = {"--model": "toy/sd3", "--guidance": 2.0, "--ttur": 2, "--iterations": 240}  # as lab.stage1's
BASES = {"sdxl": FULL | SHORT, "sd3": FULL | SHORT | SD3}
# G moves in every second loop: 40 updates before RL, 80 with it. D reads the last block: results/discriminator.md
ADVDMD = siblings.ADVDMD | RATES | SD3 | {"--student-steps": 2, "--rl-after": 40, "--d-block": "last"}
# G moves in every fifth loop: 40 updates of cold start, 40 with reward
DMDR = siblings.DMDR | RATES | {"--student-steps": 1, "--iterations": 400, "--dynamic": 40}
STAGE_2 = FULL | SD3 | {"--iterations": 90, "--lr": "2e-5", "--fake-lr": "2e-4", "--gan-crop": 32, "--rl-ratio": 2}
STUDENTS = {f"{base}-{K}": flags | {"--student-steps": K} for base, flags in BASES.items() for K in STEPS}
OTHERS = {
    "sd3-4-stage2": STAGE_2,
    "sd3-advdmd-2": ADVDMD,
    "sd3-advdmd-2-w20": ADVDMD | {"--gan-weight": 20},  # log densities are means over numbers: 1 is a small weight
    "sd3-advdmd-2-no-rl": ADVDMD | {"--rl-after": 10**6},
    "dmdr-1": DMDR,
    "dmdr-1-no-reward": DMDR | {"--reward-weight": 0},
}
INIT = {"sd3-4-stage2": "sd3-4"}  # row -> the row whose run it goes on from
RUNS = STUDENTS | OTHERS  # row -> flags; a run for each of SEEDS
UNDISTILLED = {}  # row -> evaluate.py's arguments
for base_ in BASES:
    for K_ in STEPS:
        which = ("--model", f"toy/{base_}", "--undistilled", "--steps", K_, "--guidance", Config.guidance)
        UNDISTILLED[f"undistilled-{base_}-{K_}"] = which
TEACHERS = {"sdxl": next(iter(stage1.BASELINES)), "sd3": next(iter(stage1.SD3_BASELINES))}  # rows of lab.stage1
COLUMNS = ("prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast")
GATE = (
    "rl_open",
    "d_accuracy_unseen",
    "d_accuracy_x0",
    "x0_open",
)  # AdvDMD's: the mean over the logged loops with reinforcement
QUICK = 5  # loops: G moves once with every row


def name(row, seed, num, loops=None):
    """A run's name. loops: fewer than the row's, for a quick look."""
    if row in UNDISTILLED:
        return ", ".join([row, f"{num} prompts", *stage1.which_sd3("sd3" in row)])
    flags = RUNS[row] | ({"--iterations": loops} if loops else {})
    return rows.key(flags, "--seed", seed, f"{num} prompts", *stage1.which_sd3("--model" in flags))


def measure(row, seed, num, loops=None):
    """Train and evaluate one run in its folder, which stays; metrics.json is its end. None where it is at work."""
    out = rows.folder(name(row, seed, num, loops))
    made = out / "metrics.json"
    init = rows.folder(name(INIT[row], seed, num, loops)) if row in INIT else None
    if init and not (init / "metrics.json").exists():
        measure(INIT[row], seed, num, loops)
        if not (init / "metrics.json").exists():
            return
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        locks.lock(out.with_suffix(".lock"))
    except UserError:  # another call is at it
        return
    if not made.exists():
        argv = UNDISTILLED.get(row)
        if row in RUNS:
            settings = {"--stage": 1, "--seed": seed, "--out": out, "--resume": True, "--preview-every": 0}
            settings |= {"--iterations": loops} if loops else {}
            settings |= {"--stage": 2, "--init": init} if init else {}
            rows.command("train.py", *rows.flat(RUNS[row] | settings), threads=1)
            argv = ("--run", out)
        aside = out.with_suffix(".json")
        rows.command("evaluate.py", *argv, "--num", num, "--json", aside, threads=1)
        out.mkdir(exist_ok=True)
        shutil.move(aside, made)
    locks.unlock(out.with_suffix(".lock"))


def train(only, seeds, num, workers, loops=None):
    """What is missing of these rows and seeds, seed by seed, `workers` runs at a time."""
    jobs = [(row, 0) for row in only if row in UNDISTILLED]
    jobs += [(row, seed) for seed in seeds for row in only if row in RUNS]
    there = gathered(num, loops)
    missing = [job for job in jobs if name(*job, num, loops) not in there]
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(missing), desc="steps", disable=not missing) as bar:
        for done in [pool.submit(measure, *job, num, loops) for job in missing]:
            done.result()
            bar.update()


def gathered(num, loops=None):
    """The file of rows, completed by the finished runs under runs/lab -> {run's name: metrics}. Trains nothing."""
    path = RESULTS if num == rows.NUM and not loops else rows.place(RESULTS, 0)
    results = rows.load_rewarded(path, sd3_reward_crc32=rows.crc32("toy/sd3_lrm/checkpoint/rm_head.pt"))
    for row in (*RUNS, *UNDISTILLED):
        for seed in SEEDS if row in RUNS else SEEDS[:1]:
            run = name(row, seed, num, loops)
            made = rows.folder(run) / "metrics.json"
            if run in results or not made.exists():
                continue
            results[run] = json.loads(made.read_text())
            if row in RUNS:
                logged = [json.loads(line) for line in (made.parent / "metrics.jsonl").read_text().splitlines()]
                results[run] |= {k: logged[-1][k] for k in ("samples", "seconds", "skipped_updates")}
                for column in ("rl_open", "d_accuracy_unseen", "d_accuracy_x0"):
                    if values := [m[column] for m in logged if column in m]:
                        results[run][column] = mean(values)
                if values := [m["d_accuracy_x0"] for m in logged if "d_accuracy_x0" in m]:
                    results[run]["x0_open"] = mean(v >= advdmd.Settings.rl_gate for v in values)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.rename(path)
    return results


# ------------------------------------------------------------------------------------- page and picture


def rows_of(results, num, loops=None):
    """{row: metrics of its seeds} of the rows that are there, the two teachers of lab.stage1 among them."""
    found = {}
    for row in (*UNDISTILLED, *RUNS):
        names = [name(row, seed, num, loops) for seed in (SEEDS if row in RUNS else SEEDS[:1])]
        if there := [results[n] for n in names if n in results]:
            found[row] = there
    teachers = rows.load(stage1.RESULTS)
    for base, title in TEACHERS.items():
        if (n := stage1.baseline_name(title, num)) in teachers:
            found[f"teacher-{base}"] = [teachers[n]]
    return found


def table(found, base):
    """A base model's students beside its undistilled network, and its teacher, in lines of Markdown."""
    titles = {}
    for K in STEPS:
        titles[f"undistilled-{base}-{K}"] = f"undistilled, {in_steps(K)}, w = {Config.guidance:g}"
        titles[f"{base}-{K}"] = f"student, {in_steps(K)} (`{base}-{K}`)"
    titles[f"teacher-{base}"] = f"teacher, 50 steps, w = {Config.teacher_guidance:g}"
    lines = pages.head(f"toy/{base}", COLUMNS)
    return lines + [pages.line(title, found[row], COLUMNS) for row, title in titles.items() if row in found]


def page(num=rows.NUM, loops=None):
    """results/steps.md, from the rows that are there."""
    found = rows_of(gathered(num, loops), num, loops)
    columns = (*COLUMNS, *GATE)
    others = [pages.line(f"`{row}`", found[row], columns) for row in OTHERS if row in found]
    return pages.joined(
        [
            INTRODUCTION.format(num=num),
            "![one noise, more and more steps](../docs/steps.png)",
            table(found, "sdxl"),
            table(found, "sd3"),
            pages.told(students_text, found),
            "## Stage 2 on SD3; AdvDMD with 2 steps, DMDR with 1",
            pages.head("", columns) + others,
            pages.told(others_text, found),
        ]
    )


INTRODUCTION = """
# 1, 2, 4 and 8 steps

`python -m lab.steps` trains the runs that are missing and writes this page, its picture and [steps.json](steps.json);
`--print` writes them from the runs that are there.

Runs are short, with a fifth of the samples of [stage1.md](stage1.md): batch 8, SDXL 160 loops, SD3 240 at TTUR 2, and
the same settings for every number of steps. A row is evaluated on {num} held-out prompts.
The mean over seeds stands first, each seed's value behind it. In the picture a column is one prompt and one noise; the
rows are the students of seed 0 with more and more steps, their teacher last. The reward is that of the base model's own
latents: `toy/lrm` for SDXL, `toy/sd3_lrm` for SD3.
"""


def students_text(found):
    lines = []
    for base, title in (("sdxl", "SDXL"), ("sd3", "SD3")):
        students = ", ".join(right(found[f"{base}-{K}"]) for K in STEPS)
        before = ", ".join(right(found[f"undistilled-{base}-{K}"]) for K in STEPS)
        distances = ", ".join(frechet(found[f"{base}-{K}"]) for K in STEPS)
        first, last = found[f"{base}-1"], found[f"{base}-8"]
        lines.append(
            f"- {title}, with 1, 2, 4 and 8 steps: {students} % of the prompts are right, undistilled {before} %. The "
            f"Fréchet distance is {distances}; between 1 and 8 steps lie {errors(first, last, 'frechet')}."
        )
    return "\n".join(lines)


def changes(after, before, measure, digits, scale=1):
    """A measure's change in each seed."""
    return ", ".join(f"{scale * (a[measure] - b[measure]):+.{digits}f}" for a, b in zip(after, before, strict=True))


def others_text(found):
    before, joint = found["sd3-4"], found["sd3-4-stage2"]
    online, unrewarded, heavy = (found[f"sd3-advdmd-2{end}"] for end in ("", "-no-rl", "-w20"))
    paid, unpaid = found["dmdr-1"], found["dmdr-1-no-reward"]
    return f"""
- Stage 2 on SD3, 4 steps: the reward is {figure(joint, "reward")} after it and {figure(before, "reward")} before
  ({errors(joint, before, "reward")}); {right(joint)} and {right(before)} % of the prompts are right, and the Fréchet
  distance is {frechet(joint)} and {frechet(before)}. From the student that each seed starts with, the reward changes by
  {changes(joint, before, "reward", 2)}, and the prompts right by {changes(joint, before, "prompt_accuracy", 1, 100)} %.
- AdvDMD on SD3, 2 steps: {right(online)} % of the prompts are right with reinforcement, {right(unrewarded)} % without;
  the Fréchet distance is {frechet(online)} and {frechet(unrewarded)} ({errors(online, unrewarded, "frechet")}), the
  reward {figure(online, "reward")} and {figure(unrewarded, "reward")} ({errors(online, unrewarded, "reward")}). Its
  discriminator tells {figure(online, "d_accuracy_unseen")} % of unseen latents from made ones, over all states, and
  {figure(online, "d_accuracy_x0")} % of finished ones, x_0; the gate, which sees all states, was open in
  {figure(online, "rl_open")} % of the logged loops, and would have been in {figure(online, "x0_open")} % if it saw x_0
  alone. Against a student at rest D alone comes to tell nearly all x_0 ([discriminator.md](discriminator.md)); this one
  moves, and D lags. So the claim is untestable on this toy, by the rule set before the runs (D online within 0.1 of D
  alone). With 20 times the weight {right(heavy)} % are right, the
  Fréchet distance is {frechet(heavy)} ({errors(heavy, unrewarded, "frechet")}), the reward {figure(heavy, "reward")}
  ({errors(heavy, unrewarded, "reward")}).
- DMDR on SDXL, 1 step: the reward is {figure(paid, "reward")} with the reward loss, {figure(unpaid, "reward")} without
  ({errors(paid, unpaid, "reward")}); {right(paid)} and {right(unpaid)} % of the prompts are right, the recall is
  {figure(paid, "recall")} and {figure(unpaid, "recall")} % ({errors(paid, unpaid, "recall")}).
"""


def picture(path, num, loops=None, columns=8):
    """docs/steps.png: the students of seed 0 whose runs are there, and their teachers. Nothing where there is none."""
    prompts = [world.scene(i, "test")[1] for i in range(columns)]
    drawn = {}
    for base in BASES:
        runs = {K: rows.folder(name(f"{base}-{K}", 0, num, loops)) for K in STEPS}
        runs = {K: run for K, run in runs.items() if (run / "metrics.json").exists()}
        if not runs:
            continue
        model = f"toy/{base}"
        encoder, vae = load_encoder(model, world.SIZE), load_vae(model)
        for K, run in runs.items():
            G = load_denoiser(model, student=run_folder.newest(run))
            drawn[f"{base.upper()}, {in_steps(K)}"] = generate(G, encoder, vae, prompts, K, seed=0)
        teacher = guided(load_denoiser(model), encoder.null(), Config.teacher_guidance)
        title = f"{base.upper()}'s teacher, {in_steps(50)}"
        drawn[title] = generate(teacher, encoder, vae, prompts, 50, seed=0, ode=True)
    if drawn:
        save_grid(path, list(drawn.values()), list(drawn), prompts)


def main():
    args = rows.options(__doc__.split("\n")[0], (*RUNS, *UNDISTILLED), quick=True, seeds=True)
    loops = QUICK if args.quick else None
    if not args.print:
        train(args.only, args.seeds, args.num, args.jobs, loops)
    shown = 0 if loops else args.num  # a quick look goes beside the runs
    pages.write("results/steps.md", shown, page(args.num, loops))
    picture(rows.place("docs/steps.png", shown), args.num, loops)


if __name__ == "__main__":
    main()
