"""Pictures of the teacher, DMD2, Flash-DMD's stage 1 and its stage 2: the same prompts from the same noise.

    python -m lab.grids    trains what is missing under runs/lab, then draws docs/grids.png

The three students have equal training cost, 6,400 samples: 400 loops of 16. Of stage 2 the first 200 are stage 1's, on
a schedule of its own.
"""

import matplotlib.pyplot as plt
import torch
from torchvision.utils import make_grid

from diffusion import guided
from engine import run_folder
from engine.config import Config
from engine.models import load_denoiser, load_vae
from engine.pictures import generate
from engine.prompts import load_encoder
from lab import cost, rows
from lab.stage1 import FULL
from lab.stage2 import JOINT
from toy import world

LOOPS, PROMPTS = 400, 24
RUNS = {
    "DMD2": cost.DMD2 | {"--iterations": LOOPS},
    "Flash-DMD, stage 1": FULL | {"--iterations": LOOPS},
    "half": FULL | {"--iterations": LOOPS // 2},
    "Flash-DMD, stage 2": JOINT | {"--stage": 2, "--iterations": LOOPS // 2, "--init": "half"},
}


def trained(title):
    """The folder of a run of RUNS, trained here where it is not there."""
    flags = RUNS[title]
    out = rows.folder(f"grid {flags}")
    if "--init" in flags:
        flags = flags | {"--init": trained(flags["--init"])}
    if not (out / f"checkpoint-{flags['--iterations']:06d}").is_dir():
        settings = {"--out": out, "--overwrite": True, "--preview-every": 0}
        rows.command("train.py", *rows.flat(flags | settings), threads=torch.get_num_threads())
    return out


def main():
    encoder = load_encoder(Config.model, world.SIZE)
    vae = load_vae(Config.model)
    teacher = guided(load_denoiser(Config.model), encoder.null(), Config.teacher_guidance)
    prompts = [world.scene(i, "test")[1] for i in range(PROMPTS)]
    drawn = {"teacher, 50 guided steps": generate(teacher, encoder, vae, prompts, 50, seed=0, ode=True, bar="teacher")}
    for title in RUNS:
        if title != "half":
            G = load_denoiser(Config.model, student=run_folder.newest(trained(title)))
            drawn[f"{title}, 4 steps"] = generate(G, encoder, vae, prompts, 4, seed=0, bar=title)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for ax, (title, images) in zip(axes.flat, drawn.items(), strict=True):
        ax.imshow(make_grid((images + 1) / 2, nrow=6, padding=3, pad_value=1).permute(1, 2, 0).numpy())
        ax.set(title=f"{title}: {sum(world.judge(images, prompts)[0])} of {PROMPTS} prompts right")
        ax.axis("off")
    figure.savefig("docs/grids.png", dpi=80)


if __name__ == "__main__":
    main()
