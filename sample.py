"""Few-step sampling: a trained student's pictures as PNG files.

python sample.py --steps 4                                    the newest run, the toy's held-out prompts
python sample.py --run runs/NAME --prompt "a red circle" "a large blue ring" --num 2
"""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

import data
import run_folder
from config import at_least
from models import UserError, generate, load_denoiser, load_encoder, load_vae


def read_prompts(args, config):
    """The prompts asked for; the data source's own where none are. Raises UserError for an empty one."""
    if args.prompts:
        if not Path(args.prompts).is_file():
            raise UserError(f"no such prompt file: {args.prompts}")
        prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{args.prompts} holds no prompt (one per line)")
    else:
        prompts = args.prompt or data.source(config["data"], config["resolution"], prompts=config.get("prompts", "")).prompts(8)
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty: say what to draw")
    return prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=at_least(1), help="sampling steps (default: what the student was trained for)")
    parser.add_argument("--run", default="", help="run folder (default: the newest under runs/)")
    parser.add_argument("--model", help="pipeline folder of encoders, VAE and schedule (default: the run's)")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--prompts", help="a text file, one prompt per line")
    parser.add_argument("--num", type=at_least(1), default=1, help="pictures per prompt (default: 1)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pictures at a time; does not change them")
    parser.add_argument("--out", help="folder for the pictures (default: RUN/samples-DATE-TIME)")
    args = parser.parse_args()
    try:
        run, config = run_folder.find_run(args.run)
        steps = config["student_steps"] if args.steps is None else args.steps
        if steps != config["student_steps"]:
            print(f"warning: {run} was trained for {config['student_steps']} steps, not {steps}", file=sys.stderr)
        out = Path(args.out) if args.out else run / f"samples-{datetime.now():%Y%m%d-%H%M%S}"
        if out.is_file() or out.exists() and any(out.iterdir()):
            raise UserError(f"{out} holds something already: give another --out")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = args.model or config["model"]
        encoder, vae = load_encoder(model, config["resolution"], device), load_vae(model, device)
        G = load_denoiser(model, device, student=run_folder.newest(run))  # fp32, so that the batch size does not show
        G.net.eval()
        prompts = [p for p in read_prompts(args, config) for _ in range(args.num)]
        began = time.time()
        images = generate(G, encoder, vae, prompts, steps, args.seed, batch=args.batch_size)
        seconds = (time.time() - began) / len(prompts)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        data.to_pil(image).save(out / f"{i:05d}.png")
    (out / "prompts.txt").write_text("".join(p + "\n" for p in prompts))
    shown = images[:64]
    shown = torch.cat([shown, torch.ones(-len(shown) % 8, *shown.shape[1:])]) if len(shown) > 8 else shown
    rows = shown.split(8)
    data.save_grid(out / "grid.png", list(rows), [f"{steps} steps"] * len(rows), prompts[:8] if len(rows) == 1 else ())
    print(f"{len(prompts)} pictures in {out} (all at once: {out / 'grid.png'}); {seconds:.3f} seconds per image")


if __name__ == "__main__":
    main()
