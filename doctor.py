"""Is my run healthy? A run's curves over those of healthy runs, and what is wrong in a sentence with its remedy.

    python doctor.py RUN                  runs/NAME: prints what it finds, draws RUN/doctor.png
    python doctor.py RUN --out FILE.png   the picture elsewhere

It reads metrics.jsonl and config.json, also of a run that goes on. Exit status: 0 healthy, 1 something is wrong,
2 no run to read. The rules are in engine/doctor.py; docs/health.md has each disease, made on purpose.
"""

import sys
from pathlib import Path

from engine import doctor, run_log
from engine.errors import UserError
from engine.flags import Parser, fail
from engine.stopping import leave_at_once


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--out", help="the picture, a .png file (default: RUN/doctor.png)")
    args = parser.parse_args(argv)
    try:
        run = run_log.read(args.run)
        path = check_picture(Path(args.out or run.folder / "doctor.png"))
        found = doctor.examine(run)
        from engine.curves import draw  # matplotlib: mistakes come first

        draw(run, found, path)
        print(doctor.report(run, found, path))
    except UserError as e:
        fail(e)
    return 1 if found else 0


def check_picture(path):
    """Raises UserError where the picture cannot be written -> its path."""
    if path.suffix != ".png":
        raise UserError(f"--out {path}: give a file that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"is in {path.parent}, which is not there"
        raise UserError(f"--out {path} {why}: give another file")
    try:
        with path.open("ab"):
            pass
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): give another --out") from None
    return path


if __name__ == "__main__":
    leave_at_once()
    sys.exit(main())
