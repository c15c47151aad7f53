"""The command line: flags -> settings, and mistakes in one line. Nothing here loads torch."""

import argparse
import inspect
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

from engine.config import CHOICES, METHODS, PRESETS, Config, flag
from engine.errors import UserError
from engine.run_folder import saved_settings
from engine.stopping import leave_at_once


class Parser(argparse.ArgumentParser):
    """argparse, but it prints one line for a mistake: the flags are too many to list."""

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def fail(error):
    """Print one line and exit with status 2."""
    print(f"error: {str(error).strip()}", file=sys.stderr)
    sys.exit(2)


def start(check):
    """The beginning of a script, before torch is loaded -> check()'s result; its UserError ends the process.

    From here on Ctrl-C ends it at once, with one line.
    """
    leave_at_once()
    try:
        return check()
    except UserError as e:
        return fail(e)


def at_least(low, most=math.inf):
    """An argparse type: a whole number, `low` or more, not above `most`."""

    def number(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
        return value

    return number


def finite(text):
    """An argparse type: a number, not nan or inf."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def device(text):
    """An argparse type: the name of a torch device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text}")
    return text


def size(text):
    """An argparse type: "HxW" or one number in pixels -> [height, width]."""
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"must be HxW or one number, in pixels, such as 1024x768, not {text}")
    return [int(sides[1]), int(sides[2] or sides[1])]


def _range(text):
    low, high = map(float, text.split(","))
    if not 0 <= low < high <= 1:
        raise ValueError
    return low, high


def _thresholds(text):
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        why = f"must be a number, or one for each student step, such as 0.6,0.573, not {text}"
        raise argparse.ArgumentTypeError(why) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _stage(text):
    return int(text) if text.isdigit() else text


KINDS = {tuple: _range, float | tuple: _thresholds, int | str: _stage}  # a field's type -> how its flag is read


def method_of(argv=None):
    """The method of a command line: that of --method, of the run it resumes, or of --preset; "flash" otherwise."""
    first = Parser(add_help=False)
    for name in ("--method", "--preset", "--out"):
        first.add_argument(name, default="")
    first.add_argument("--resume", action="store_true")
    given, _ = first.parse_known_args(argv)
    before = saved_settings(given.out) if goes_on(given.out, given.resume) else {}
    named = given.method or before.get("method") or PRESETS.get(given.preset, {}).get("method")
    return named if named in METHODS else "flash"


def parse(argv=None, settings=Config):
    """Command line -> an object of `settings`: Config, or a sibling's Settings.

    The last one wins: the method's defaults, the preset, the settings of a run that goes on, the flags given.
    Exits with status 2 and one line where a flag cannot be read. Values are checked by engine.run_folder.look.
    """
    parser = Parser(description="Train a few-step student: Flash-DMD, Algorithm 1.")
    notes = help_texts(settings)
    for f in fields(settings):
        if f.type is bool:
            kind = {"action": "store_true"}
        else:
            kind = {"type": KINDS.get(f.type, f.type), "choices": CHOICES.get(f.name)}
        note = f"{notes[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(flag(f.name), default=None, help=note, **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not given.get("out"):
        parser.error("torchrun --max-restarts needs --out: the folder in which a restart goes on")
    before = {}
    if goes_on(given.get("out"), given.get("resume")):
        given["resume"] = True
        saved = saved_settings(given.get("out"))
        before = {k: v for k, v in saved.items() if k in notes and k not in ("preset", "overwrite")}
    preset = {k: v for k, v in PRESETS[given.get("preset", "toy")].items() if k in notes}  # one has DMD2's own flag
    values = preset | before | given
    config = settings(**values)
    for name, value in vars(config).items():
        if isinstance(value, list):  # of a config.json
            setattr(config, name, tuple(value))
    return config


def help_texts(settings):
    """{field: its comment} of a settings class and its parents; the class's own comment wins."""
    notes = {}
    for cls in reversed(settings.__mro__[:-1]):
        notes |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    return notes


def goes_on(out, resume):
    """Whether a command goes on with the run in folder `out`: by --resume, or because torchrun restarts it."""
    launch = Path(out or "", "launch")  # the id of the torchrun that started the run
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and bool(out)
    return resume or restarted and launch.is_file() and launch.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")
