"""Metrics of a student, its teacher, or the teacher at few steps, on the toy's held-out prompts or a file of prompts.

python evaluate.py --run runs/NAME --steps 4
python evaluate.py --teacher --model toy/sdxl --steps 50
python evaluate.py --undistilled --model toy/sdxl --steps 4
python evaluate.py --run runs/NAME --prompts coco10k.txt --images DIR   the paper's tables (engine/benchmark.py)
"""

import json
from pathlib import Path

from engine import base_model, picture_folder, run_folder
from engine.config import Config
from engine.errors import UserError
from engine.flags import Parser, at_least, device, fail, finite
from engine.folders import check_writable
from engine.stopping import leave_at_once
from engine.text import prompts as read_prompts


def flags(argv=None):
    """The command line, read. Exits with status 2 and one line on a bad flag."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", default="", help="a student's run folder (default: the newest under runs/)")
    what.add_argument("--teacher", action="store_true", help="the guided multi-step teacher")
    what.add_argument("--undistilled", action="store_true", help="the guided teacher in the student's few-step sampler")
    add(
        "--model",
        default=Config.model,
        help=f"pipeline folder of --teacher and --undistilled (default: {Config.model})",
    )
    add(
        "--steps",
        type=at_least(1),
        help="sampling steps (default: the student's, 50 for --teacher, 4 for --undistilled)",
    )
    add("--loops", type=at_least(1), help="--run: the checkpoint of this loop (default: the newest)")
    add(
        "--guidance",
        type=finite,
        default=Config.teacher_guidance,
        help="the teacher's guidance scale (default: %(default)s)",
    )
    add(
        "--resolution",
        type=int,
        default=Config.resolution,
        help="of --teacher and --undistilled (default: %(default)s)",
    )
    add("--clip", help=f"the CLIP that measures: a folder or a hub name (default: the run's; {Config.clip})")
    add("--num", type=at_least(1), help="prompts (default: 1000 held-out ones, or all of --prompts)")
    add("--seed", type=at_least(0), default=0, help="of the noise (default: 0)")
    add(
        "--reference",
        choices=("real", "teacher"),
        default="real",
        help="what Fréchet distance, precision and recall compare with (default: real)",
    )
    add(
        "--reward",
        help='folder of the latent reward model (default: the run\'s, or "lrm" beside the model, if there is one)',
    )
    add("--prompts", help="a text file, one prompt per line: the paper's scores in place of the toy's")
    add("--images", help="--prompts: folder of the pictures; those already there are not drawn again")
    add("--pick", help="--prompts: PickScore's folder or hub name (yuvalkirstain/PickScore_v1)")
    add(
        "--scores",
        nargs="+",
        default=[],
        help="--prompts: JSON files of scores made elsewhere (lab/external_scores.py)",
    )
    add("--json", help="write the metrics to this file too")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    return parser.parse_args(argv)


def check(args):
    """Check flags and folders before torch is loaded -> a student's folder or None, settings, steps, made_by.

    The settings are a dict; made_by is what the pictures of --prompts depend on. Raises UserError.
    """
    if args.prompts and not args.images:
        raise UserError("--prompts needs --images, a folder for the pictures")
    prompts = read_prompts(args.prompts)[: args.num] if args.prompts else []
    if args.num is not None and args.num < 8 and not args.prompts:
        raise UserError("--num must be at least 8: the metrics compare distributions")
    if args.teacher or args.undistilled:
        student = None
        config = {"model": args.model, "data": Config.data, "resolution": args.resolution, "clip": Config.clip}
        steps = args.steps or (50 if args.teacher else 4)
    else:
        student, config = run_folder.find_student(args.run, args.loops)
        steps = args.steps or config["student_steps"]
    base_model.check(config["model"])
    if args.json:
        if Path(args.json).is_dir():
            raise UserError(f"--json {args.json} is a folder: name a file")
        check_writable(Path(args.json).parent, "--json")
    return student, config, steps, drawn_by(args, prompts, student, config, steps) if prompts else None


def drawn_by(args, prompts, student, config, steps):
    """What the pictures of `prompts` depend on, a dict. Raises UserError where --images holds others."""
    made_by = {"model": str(student or config["model"]), "resolution": config["resolution"]}
    made_by |= {"steps": steps, "seed": args.seed, "ode": args.teacher}
    if student is None:
        made_by["guidance"] = args.guidance
    else:
        made_by["saved"] = run_folder.made_at(student)
    made_by["prompts"] = prompts
    before = picture_folder.settings_of(args.images, "--images")
    picture_folder.compare(args.images, before, made_by, "--images")
    return made_by


def main(argv=None):
    args = flags(argv)
    try:
        checked = check(args)
        from engine import evaluation  # it loads torch: flags and folders are checked first

        result = evaluation.run(args, *checked)
    except UserError as e:
        fail(e)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    text = json.dumps(rounded, indent=2)
    print(text)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    leave_at_once()
    main()
