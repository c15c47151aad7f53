"""What the teacher gets wrong: prompts right by number of objects, and which shape it draws for the one asked for.

python -m lab.confusions --num 320 --steps 16
"""

import argparse
from collections import Counter

from config import Config
from diffusion import guided
from models import PromptEncoder, generate, load_denoiser, load_vae
from toy import world


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=320, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=16, help="guided sampling steps")
    args = parser.parse_args()
    encoder, vae, teacher = PromptEncoder(Config.model, world.SIZE), load_vae(Config.model), load_denoiser(Config.model)
    prompts = [world.scene(i, "test")[1] for i in range(args.num)]
    images = generate(guided(teacher, encoder.null(), Config.guidance), encoder, vae, prompts, args.steps, seed=0, ode=True)
    right, asked, drawn = Counter(), Counter(), Counter()
    for found, prompt in zip(world.detect(images), prompts):
        stated, _ = world.parse(prompt)
        asked[len(stated)] += 1
        right[len(stated)] += all(map(all, world.check(found, prompt).values()))
        if len(stated) == len(found.objects) == 1:
            drawn[stated[0]["shape"], found.objects[0].shape] += 1
    for n in sorted(asked):
        print(f"{n} object{'s' * (n > 1)}: {right[n]} of {asked[n]} prompts right ({right[n] / asked[n]:.0%})")
    for shape in world.SHAPES:
        row = {other: drawn[shape, other] for other in (*world.SHAPES, "malformed") if drawn[shape, other]}
        print(f"asked for a {shape}:", ", ".join(f"{other} {n}" for other, n in row.items()))


if __name__ == "__main__":
    main()
