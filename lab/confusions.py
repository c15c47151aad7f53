"""What a model gets wrong: which facts fail, and which shape it draws for the one asked for.

python -m lab.confusions --num 320 --steps 16            the guided teacher
python -m lab.confusions --num 320 --run runs/NAME       a student
"""

import argparse
from collections import Counter

from diffusion import guided
from engine import run_folder
from engine.config import Config
from engine.flags import at_least
from engine.models import load_denoiser, load_vae
from engine.pictures import generate
from engine.prompts import load_encoder
from toy import world


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=at_least(1), default=320, help="held-out prompts")
    parser.add_argument("--steps", type=at_least(1), default=16, help="the teacher's guided sampling steps")
    parser.add_argument("--run", help="look at this run's student instead, at its own steps")
    args = parser.parse_args()
    encoder = load_encoder(Config.model, world.SIZE)
    vae = load_vae(Config.model)
    if args.run:
        run, config = run_folder.find_run(args.run)
        denoiser = load_denoiser(Config.model, student=run_folder.newest(run))
        steps = config["student_steps"]
    else:
        denoiser = guided(load_denoiser(Config.model), encoder.null(), Config.teacher_guidance)
        steps = args.steps
    prompts = [world.scene(i, "test")[1] for i in range(args.num)]
    images = generate(denoiser, encoder, vae, prompts, steps, seed=0, ode=not args.run, bar="pictures")
    drawn = Counter()
    failed = Counter()
    for found, prompt in zip(world.detect(images), prompts):
        wrong = [fact for fact, true in world.check(found, prompt).items() if not true]
        failed.update(wrong or ["nothing"])
        failed["count, too many objects"] += len(found.objects) > 1
        if len(found.objects) == 1:
            drawn[world.parse(prompt)["shape"], found.objects[0].shape] += 1
    print(f"of {args.num} prompts, wrong:", ", ".join(f"{fact} {n}" for fact, n in failed.most_common()))
    for shape in world.SHAPES:
        row = {other: drawn[shape, other] for other in (*world.SHAPES, "malformed") if drawn[shape, other]}
        print(f"asked for a {shape}:", ", ".join(f"{other} {n}" for other, n in row.items()))


if __name__ == "__main__":
    main()
