"""Export a student for use without this project: a diffusers pipeline folder with a model card.

python export.py RUN OUT             the student as a pipeline folder of its own, its scheduler baked in
python export.py RUN OUT --lora      of a LoRA student: its LoRA, scheduler and card, for a pipeline's load_lora_weights
"""

from engine import base_model
from engine.errors import UserError
from engine.flags import Parser, fail
from engine.folders import check_new
from engine.run_folder import find_run
from engine.stopping import leave_at_once


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder")
    parser.add_argument("out", help="a new folder")
    parser.add_argument(
        "--lora", action="store_true", help="of a LoRA student, its LoRA, scheduler and model card alone"
    )
    args = parser.parse_args(argv)
    try:
        _, config = find_run(args.run)
        base_model.check(config["model"])
        base_model.t5_of(config["model"], config["t5"])
        check_new(args.out, "folder")
        from engine.export import export  # it loads torch: mistakes in flags and folders come first

        what = "LoRA, scheduler" if args.lora else "pipeline"
        print(f"{what} and model card in {export(args.run, args.out, args.lora)}")
    except UserError as e:
        fail(e)


if __name__ == "__main__":
    leave_at_once()
    main()
