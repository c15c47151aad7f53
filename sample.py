"""Few-step sampling: a trained student's pictures as PNG files.

python sample.py --steps 4                                    the newest run, the toy's held-out prompts
python sample.py --run runs/NAME --prompt "a red circle" "a large blue ring" --num 2
"""

import sys
import time
from datetime import datetime
from pathlib import Path

from engine import run_folder
from engine.errors import UserError
from engine.flags import Parser, at_least, fail
from engine.text import prompts as read_prompts


def flags(argv=None):
    """The command line, read. Exits with status 2 and one line on a bad flag."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=at_least(1), help="sampling steps (default: what the student was trained for)")
    parser.add_argument("--run", default="", help="run folder (default: the newest under runs/)")
    parser.add_argument("--model", help="pipeline folder of encoders, VAE and schedule (default: the run's)")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--prompts", help="a text file, one prompt per line")
    parser.add_argument("--num", type=at_least(1), default=1, help="pictures per prompt (default: 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise (default: 0)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pictures at a time; does not change them")
    parser.add_argument("--out", help="folder for the pictures (default: RUN/samples-DATE-TIME)")
    return parser.parse_args(argv)


def given_prompts(args):
    """The prompts that the flags name; [] where they name none. Raises UserError for an empty one."""
    prompts = args.prompt or []
    if args.prompts:
        prompts = read_prompts(args.prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty: say what to draw")
    return prompts


def draw(args):
    """Draw what the flags say, and write it. Raises UserError for what a user can mend."""
    run, config = run_folder.find_run(args.run)
    steps = config["student_steps"] if args.steps is None else args.steps
    if steps != config["student_steps"]:
        print(f"warning: {run} was trained for {config['student_steps']} steps, not {steps}", file=sys.stderr)
    out = Path(args.out) if args.out else run / f"samples-{datetime.now():%Y%m%d-%H%M%S}"
    if out.is_file() or out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something already: give another --out")
    prompts = given_prompts(args)

    import torch  # only now: mistakes in flags and folders are answered first

    from engine import data, models, pictures
    from engine import prompts as text

    model = args.model or config["model"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = text.load_encoder(model, config["resolution"], device)
    vae = models.load_vae(model, device)
    G = models.load_denoiser(model, device, student=run_folder.newest(run))  # fp32: the batch size must not show
    G.net.eval()
    if not prompts:
        prompts = data.source(config["data"], config["resolution"], prompts=config.get("prompts", "")).prompts(8)
    prompts = [p for p in prompts for _ in range(args.num)]
    began = time.time()
    images = pictures.generate(G, encoder, vae, prompts, steps, args.seed, batch=args.batch_size)
    seconds = (time.time() - began) / len(prompts)

    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pictures.to_pil(image).save(out / f"{i:05d}.png")
    (out / "prompts.txt").write_text("".join(p + "\n" for p in prompts))
    shown = images[:64]
    if len(shown) > 8:  # whole rows of eight
        shown = torch.cat([shown, torch.ones(-len(shown) % 8, *shown.shape[1:])])
    rows = shown.split(8)
    labels = prompts[:8] if len(rows) == 1 else ()
    pictures.save_grid(out / "grid.png", list(rows), [f"{steps} steps"] * len(rows), labels)
    grid = out / "grid.png"
    print(f"{len(prompts)} pictures in {out} (all at once: {grid}); {seconds:.3f} seconds per image")


def main(argv=None):
    args = flags(argv)
    try:
        draw(args)
    except UserError as e:
        fail(e)


if __name__ == "__main__":
    main()
