"""Metrics of a student, its teacher, or the teacher at few steps, on the toy's held-out prompts or a file of prompts.

python evaluate.py --run runs/NAME --steps 4
python evaluate.py --teacher --model toy/sdxl --steps 50
python evaluate.py --undistilled --model toy/sdxl --steps 4
python evaluate.py --run runs/NAME --prompts coco10k.txt --images DIR   the paper's tables (engine/benchmark.py)
python evaluate.py --run runs/NAME --benchmark geneval --prompts evaluation_metadata.jsonl --images DIR --judge PATH
python evaluate.py --compare TEACHER.json STUDENT.json ...   a table and a page of pictures (engine/report.py)
"""

import json
import os
from pathlib import Path

from engine import base_model, picture_folder, report, reward_layout, run_folder
from engine.config import TIMESTEPS, Config
from engine.errors import UserError
from engine.flags import Parser, at_least, device, fail, finite
from engine.folders import check_writable
from engine.prompt_set import read as read_prompts
from engine.sd3 import t5_of
from engine.stopping import leave_at_once


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
        type=at_least(1, TIMESTEPS),
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
    add("--t5", choices=("on", "off"), help="of --teacher and --undistilled, SD3 (default: on where the model has it)")
    add(
        "--text-length",
        type=at_least(1),
        default=Config.text_length,
        help="T5's tokens, of the same (default: %(default)s)",
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
        help="folder of the latent reward model (default: the run's, or the one beside the model, if there is one)",
    )
    add("--prompts", help="a text file, one prompt per line: the paper's scores in place of the toy's")
    add(
        "--benchmark",
        choices=("geneval", "dpg"),
        help="--prompts is GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder dpg_bench (or its csv)",
    )
    add("--per-prompt", type=at_least(1), help="pictures of each of --prompts (default: 1; of a benchmark 4)")
    add("--images", help="--prompts: folder of the pictures; those already there are not drawn again")
    add(
        "--judge",
        help="--benchmark: GenEval's Mask2Former (folder, hub name, or OpenMMLab's .pth), DPG-Bench's vision-language "
        "model; without it pictures are drawn and not judged",
    )
    add("--pick", help="--prompts: PickScore's folder or hub name (yuvalkirstain/PickScore_v1)")
    add(
        "--scores",
        nargs="+",
        default=[],
        help="--prompts: JSON files of scores made elsewhere (lab/external_scores.py), or of DPG-Bench's answers",
    )
    add(
        "--features",
        nargs="+",
        default=[],
        help="--prompts: a DINOv2 (facebook/dinov2-large): diversity, FD; torch-fidelity's Inception .pth: FID",
    )
    add("--real", help="--features: real pictures to compare with: a folder, or statistics (.npz: mu, sigma)")
    add("--compare", nargs="+", metavar="JSON", help="results of --json, side by side; nothing is drawn")
    add("--report", help="--compare: the page of pictures (default: the last result's name with .html)")
    add("--json", help="write the metrics to this file too")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of what draws (default: %(default)s)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    return parser.parse_args(argv)


def check(args):
    """Check flags and folders before torch is loaded -> student, config, steps, prompt_set, made_by.

    student: its folder or None; config: a dict; prompt_set: --prompts' PromptSet or None; made_by: what its pictures
    depend on. Raises UserError.
    """
    prompt_set = read_prompts(args)
    if args.text_length > 512:
        raise UserError("--text-length must lie in 1 to 512")
    if args.num is not None and args.num < 8 and not args.prompts:
        raise UserError("--num must be at least 8: the metrics compare distributions")
    if args.teacher or args.undistilled:
        student = None
        config = {"model": args.model, "data": Config.data, "resolution": args.resolution, "clip": Config.clip}
        config |= {"t5": args.t5 or "", "text_length": args.text_length}
        steps = args.steps or (50 if args.teacher else 4)
    else:
        student, config = run_folder.find_student(args.run, args.loops)
        steps = args.steps or config["student_steps"]
    base_model.check(config["model"])
    if config.get("teacher") and args.reference == "teacher":
        base_model.check(config["teacher"])
    config["t5"] = t5_of(config["model"], config["t5"])
    if args.reward:
        reward_layout.check(args.reward, config["model"])
    if args.json:
        if Path(args.json).is_dir():
            raise UserError(f"--json {args.json} is a folder: name a file")
        check_writable(Path(args.json).parent, "--json")
    made_by = drawn_by(args, prompt_set, student, config, steps) if prompt_set else None
    return student, config, steps, prompt_set, made_by


def drawn_by(args, prompt_set, student, config, steps):
    """What the pictures of --prompts depend on, a dict. Raises UserError where --images holds others."""
    made_by = {"model": str(student or config["model"]), "resolution": config["resolution"]}
    made_by |= {"steps": steps, "seed": args.seed, "ode": args.teacher}
    made_by["dtype"] = args.dtype
    if student is None:
        made_by["guidance"] = args.guidance
        if t5_of(config["model"], "") == "on":
            made_by["text_length"] = config["text_length"] if config["t5"] == "on" else 0
    else:
        made_by["saved"] = run_folder.made_at(student)
    made_by |= prompt_set.settings()
    if int(os.environ.get("RANK", 0)) == 0:  # the other ranks could find what rank 0 has just begun
        before = picture_folder.settings_of(args.images, "--images")
        before = before and {"dtype": "fp32"} | before
        picture_folder.compare(args.images, before, made_by, "--images")
    return made_by


def compare(args):
    """--compare: print the table, write the page."""
    out = args.report or Path(args.compare[-1]).with_suffix(".html")
    print(report.compare(args.compare, out, args.num or report.MOST))
    print(f"\npictures, worst first: {out}")


def main(argv=None):
    args = flags(argv)
    try:
        if args.compare:
            return compare(args)
        checked = check(args)
        from engine import evaluation  # it loads torch: flags and folders are checked first

        result = evaluation.run(args, *checked)
    except UserError as e:
        fail(e)
    if result is None:  # not the first rank
        return
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    text = json.dumps(rounded, indent=2)
    print(text)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    leave_at_once()
    main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from engine.distributed import leave

        leave()
