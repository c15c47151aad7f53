"""Few-step sampling: a trained student's pictures as PNG files, each written when it is drawn.

python sample.py --steps 4                                    the newest run, the toy's held-out prompts
python sample.py --run runs/NAME --prompt "a red circle" "a large blue ring" --num 2
python sample.py --resume --out FOLDER                        the rest of a call that was stopped
"""

import sys
import time
from datetime import datetime
from pathlib import Path

from engine import base_model, picture_folder, run_folder, stopping
from engine.config import TIMESTEPS
from engine.errors import UserError
from engine.flags import Parser, at_least, device, fail, size
from engine.folders import check_size
from engine.text import prompts as read_prompts

SETTINGS = ("model", "steps", "num", "seed", "size", "dtype", "prompts")  # beside the student, what pictures depend on


def flags(argv=None):
    """The command line, read. Exits with status 2 and one line on a bad flag."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=at_least(1, TIMESTEPS), help="sampling steps (default: what the student was trained for)")
    add("--run", default="", help="run folder (default: the newest under runs/)")
    add("--model", help="pipeline folder of encoders, VAE and schedule (default: the run's)")
    add("--prompt", nargs="+", help="one or more prompts")
    add("--prompts", help="a text file, one prompt per line")
    add("--num", type=at_least(1), help="pictures per prompt (default: 1)")
    add("--seed", type=at_least(0), help="of the noise (default: 0)")
    add("--size", type=size, help="HxW or one number, pixels (default: the square that the student was trained on)")
    add("--batch-size", type=at_least(1), help="pictures at a time; does not change them (default: 16, 4 at 1024)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="the networks' (default: bf16 on a GPU, fp32 on a CPU)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    add("--out", help="folder for the pictures (default: RUN/samples-DATE-TIME)")
    add("--resume", action="store_true", help="draw what --out lacks, as it was begun")
    return parser.parse_args(argv)


def given_prompts(args):
    """The prompts that the flags name; None where they name none. Raises UserError for an empty one."""
    if args.prompts:
        return read_prompts(args.prompts)
    if args.prompt and not all(prompt.strip() for prompt in args.prompt):
        raise UserError("--prompt is empty: say what to draw")
    return args.prompt


def plan(args):
    """Check flags and folders before torch is loaded -> the student's folder, its run's settings, --out, what to draw.

    What to draw is a dict, the later settings.json of --out; its prompts and dtype may still be None. Raises UserError.
    """
    if args.resume and not args.out:
        raise UserError("--resume needs --out, the folder to go on with")
    before = {}
    if args.out:
        before = picture_folder.settings_of(args.out, "--out")
        if before and not args.resume:
            raise UserError(f"{args.out} holds something already: give another --out, or --resume to draw the rest")
    if before and not args.run:
        student, config = run_folder.student_at(before["student"])
    else:
        student, config = run_folder.find_student(args.run)
    out = Path(args.out or run_folder.run_of(student) / f"samples-{datetime.now():%Y%m%d-%H%M%S}")
    if not args.out:
        picture_folder.settings_of(out, "--out")
    side = config["resolution"]
    defaults = {"model": config["model"], "steps": config["student_steps"], "num": 1, "seed": 0, "size": [side, side]}
    given = {name: getattr(args, name) for name in SETTINGS} | {"prompts": given_prompts(args)}
    given = {name: value for name, value in given.items() if value is not None}
    now = dict.fromkeys(SETTINGS) | defaults | {k: before[k] for k in SETTINGS if k in before} | given
    now |= {"student": str(student.resolve()), "saved": run_folder.made_at(student)}
    picture_folder.compare(out, before, now, "--out")
    now["batch"] = args.batch_size or before.get("batch")  # another one changes pictures by rounding alone
    base_model.check(now["model"])
    base_model.t5_of(now["model"], config["t5"])
    check_size(now["model"], now["size"])
    if now["steps"] != config["student_steps"]:
        print(f"warning: {student} is for {config['student_steps']} steps, not {now['steps']}", file=sys.stderr)
    return student, config, out, now


def load(student, config, model, dtype, where):
    """-> prompt encoder, VAE and denoiser of a student's folder, on the device, in a torch dtype (the VAE in fp32).

    config: its run's settings; model: the pipeline folder of the rest.
    """
    import torch

    from engine import models, prompts

    encoder = prompts.encoder_of(config, where, dtype, model)
    vae = models.load_vae(model, where)
    G = models.load_denoiser(model, where, dtype, student=student)
    torch.nn.Module.to(G.net, dtype).eval()  # diffusers' own warns
    return encoder, vae, G


def draw(args):
    """Draw what the flags say, each picture written when it is drawn. Raises UserError for what a user can mend."""
    student, config, out, now = plan(args)

    import torch  # only now: mistakes in flags and folders are answered first

    from engine import data, models, pictures

    where = pictures.device_of(args.device)
    now["dtype"] = now["dtype"] or ("bf16" if where.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[now["dtype"]]
    resolution = config["resolution"]
    encoder, vae, G = load(student, config, now["model"], dtype, where)
    now["prompts"] = now["prompts"] or data.source(
        config["data"], resolution, prompts=config.get("prompts", "")
    ).prompts(8)
    now["batch"] = now["batch"] or min(16, models.at_once(*now["size"]))
    prompts = [p for p in now["prompts"] for _ in range(now["num"])]

    picture_folder.begin(out, now)
    (out / "prompts.txt").write_text("".join(p + "\n" for p in prompts))
    stopping.last_words = lambda: (
        f"{len(prompts) - len(picture_folder.missing(out, len(prompts)))} of {len(prompts)} pictures are in {out}; "
        f"draw the rest with: python sample.py --resume --out {out}"
    )
    began = time.time()
    drawn = pictures.draw(out, G, encoder, vae, prompts, now["steps"], now["seed"], now["batch"], now["size"])
    seconds = (time.time() - began) / max(drawn, 1)
    save_grid(out, prompts, now["steps"])
    picture_folder.end(out)
    speed = f"{seconds:.3f} seconds per image" if drawn else "all of them were there"
    print(f"{len(prompts)} pictures in {out} (all at once: {out / 'grid.png'}); {speed}")


def save_grid(out, prompts, steps):
    """The first 64 pictures of a folder as one, eight in a row."""
    import torch

    from engine import pictures

    shown = [pictures.read_picture(picture_folder.picture(out, i), most=256) for i in range(len(prompts[:64]))]
    if len(shown) > 8:  # whole rows of eight
        shown += [torch.ones_like(shown[0])] * (-len(shown) % 8)
    rows = torch.stack(shown).split(8)
    labels = prompts[:8] if len(rows) == 1 else ()
    pictures.save_grid(out / "grid.png", list(rows), [pictures.in_steps(steps)] * len(rows), labels)


def main(argv=None):
    args = flags(argv)
    try:
        draw(args)
    except UserError as e:
        fail(e)
    except RuntimeError as e:
        from engine.pictures import out_of_memory

        fail(out_of_memory(e))


if __name__ == "__main__":
    stopping.leave_at_once()
    main()
