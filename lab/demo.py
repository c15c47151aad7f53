"""Both stages on the toy world in minutes, with pictures and numbers: `make demo`.

    python -m lab.demo             writes runs/demo and runs/demo-stage2
    python -m lab.demo --seed 1 --out runs/again

It does what the commands do that it prints, in one process, so that torch is loaded once. The settings are those of a
short run: rates that fall to zero over few loops. results/ has the longer ones.
"""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.flags import Parser, at_least, fail
from engine.run_folder import newest

STAGE_1 = "--batch-size 8 --iterations 230 --lr 6e-5 --fake-lr 4e-4 --gan-crop 32 --preview-every 230"
STAGE_2 = "--iterations 160 --lr 4e-5 --fake-lr 3e-4 --gan-crop 32 --rl-ratio 1 --rl-lr 2e-5 --preview-every 160"
EVALUATED = 200  # prompts


@dataclass
class Step:
    """A command of the demo, and which part of the demo's time it takes."""

    name: str
    script: str
    flags: str
    part: float


def steps(out, seed=0):
    """The demo's commands in order. The parts of the time are those on two AVX2 cores."""
    out, two = shlex.quote(out), shlex.quote(f"{out}-stage2")
    both = f"--seed {seed} --overwrite"
    evaluated = f"--steps 4 --num {EVALUATED} --json"
    return [
        Step(
            "stage 1: distribution matching and Pixel-GAN", "train.py", f"--stage 1 --out {out} {STAGE_1} {both}", 0.48
        ),
        Step("the student of stage 1", "evaluate.py", f"--run {out} {evaluated} {out}/metrics.json", 0.02),
        Step("stage 2: reinforcement joins", "train.py", f"--stage 2 --init {out} --out {two} {STAGE_2} {both}", 0.47),
        Step("the student of stage 2", "evaluate.py", f"--run {two} {evaluated} {two}/metrics.json", 0.02),
        Step("its pictures", "sample.py", f"--steps 4 --run {two} --out {two}/samples", 0.01),
    ]


def run(step):
    """Run one command in this process. Raises UserError for a training run that was stopped."""
    import evaluate
    import sample
    import train

    argv = shlex.split(step.flags)
    if step.script == "train.py":
        config = train.read(argv)
        made = newest(train.train(config))
        if json.loads((made / "progress.json").read_text())["loops"] < config.iterations:
            raise UserError(f"stopped; what is done is in {config.out}")
    else:
        {"evaluate.py": evaluate.main, "sample.py": sample.main}[step.script](argv)


def minutes(seconds):
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def report(out):
    """The numbers and pictures that matter, as lines."""
    one, two = (json.loads(Path(run, "metrics.json").read_text()) for run in (out, f"{out}-stage2"))
    right = [f"{100 * m['prompt_accuracy']:.1f} %" for m in (one, two)]
    (preview,) = sorted(Path(f"{out}-stage2").glob("preview-*.png"))[-1:]
    return [
        f"prompts right, of {EVALUATED}, exactly checked: {right[0]} after stage 1, {right[1]} after stage 2",
        f"reward: {one['reward']:.2f} after stage 1, {two['reward']:.2f} after stage 2",
        f"Fréchet distance to real scenes: {one['frechet']:.2f} after stage 1, {two['frechet']:.2f} after stage 2",
        f"undistilled, stage 1, stage 2 and teacher, from the same noise: {preview}",
        f"pictures of the student: {out}-stage2/samples/grid.png",
    ]


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="stage 1's run folder; stage 2's is OUT-stage2")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of both runs (default: 0)")
    args = parser.parse_args(argv)
    began = time.time()
    done = 0.0
    plan = steps(args.out, args.seed)
    try:
        for n, step in enumerate(plan, 1):
            spent = time.time() - began
            left = f"; about {minutes(spent * (1 - done) / done)} left" if done else ""
            print(f"\n[{n}/{len(plan)}] {step.name}{left}\n      python {step.script} {step.flags}", flush=True)
            run(step)
            done += step.part
        print(f"\nboth stages in {minutes(time.time() - began)}", *report(args.out), sep="\n")
    except UserError as e:
        fail(e)


if __name__ == "__main__":
    main()
