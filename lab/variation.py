"""How much a picture depends on the noise of each step (Fig. 3).

Prompt and first noise stay the same, and the noise after one step is drawn anew.

    python -m lab.variation            results/variation.json, of the students of lab.stage1's first row; the table
    python -m lab.variation --print    the table from what is there
"""

from pathlib import Path

import torch

from diffusion import Schedule, add_noise, times
from engine.config import Config
from engine.metrics import diversity
from engine.models import load_denoiser, load_vae
from engine.prompts import load_encoder
from engine.run_folder import newest
from lab import pages, rows, stage1
from lab.rows import SEEDS
from toy import world

RESULTS = Path("results/variation.json")
DRAWS = 8  # per prompt


@torch.no_grad()
def variation(G, encoder, vae, prompts, S, step, seed=0):
    """Root mean squared difference between finished pictures that differ in the noise after S[step] alone.

    DRAWS pictures per prompt; channels in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(S), len(prompts), 4, 16, 16, generator=generator)  # x_T, and after every step but the last
    shared = noise.repeat_interleave(DRAWS, 1)
    c = {k: v.repeat_interleave(DRAWS, 0) for k, v in encoder.encode(prompts).items()}
    x_t = shared[0]
    for i, t in enumerate(S):
        x_0 = G(x_t, times(t, x_t), c)
        if i + 1 < len(S):
            eps = torch.randn(x_0.shape, generator=generator) if i == step else shared[i + 1]
            x_t = add_noise(G.schedule, x_0, times(S[i + 1], x_0), eps)
    return diversity(vae.decode(x_0).clamp(-1, 1), DRAWS)


def title(t):
    return f"noise drawn anew after step {t:g}"


def name(seed):
    return f"variation, seed {seed}"


TITLES = [title(t) for t in Schedule().steps(4)[:-1]]


def measure(seed, num, threads, prompts=64):
    """-> {title of a step: variation} of a seed's student."""
    torch.set_num_threads(threads)
    encoder = load_encoder(Config.model, world.SIZE)
    vae = load_vae(Config.model)
    G = load_denoiser(Config.model, student=newest(stage1.student(seed, num, threads)))
    G.net.eval()
    S = G.schedule.steps(4)
    words = [world.scene(i, "test")[1] for i in range(prompts)]
    return {which: variation(G, encoder, vae, words, S, i) for i, which in enumerate(TITLES)}


def train(num):
    """What is missing, one student at a time."""
    jobs = {name(s): lambda threads, s=s: measure(s, num, threads) for s in SEEDS}
    rows.fill(RESULTS, rows.load(RESULTS), jobs, 1)


def show():
    """The table, from what is there."""
    results = rows.load(RESULTS)
    found = [results[name(s)] for s in SEEDS if name(s) in results]
    lines = pages.head("Fig. 3", ("variation",))
    for which in TITLES:
        lines.append(pages.line(which, [{"variation": row[which]} for row in found], ("variation",)))
    print("\n".join(lines))


def main():
    args = rows.options(__doc__.split("\n")[0], ("variation",))
    if not args.print:
        train(args.num)
    show()


if __name__ == "__main__":
    main()
