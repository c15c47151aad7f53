"""What a run has logged, as doctor.py reads it: metrics.jsonl and config.json, and averages of signals. No torch here.

An average is over the second half of what is logged of a signal so far, if that is LEAST values or more.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from engine.config import Config
from engine.errors import UserError
from engine.folders import HERE
from engine.run_folder import saved_settings

LEAST = 6  # values
BANDS = HERE / "toy" / "bands.json"  # where signals of healthy toy runs lie, made by lab/health.py
LINEAR = (  # the mean of these; of all others, ratios and sizes, the geometric mean
    *"d_accuracy d_accuracy_unseen d_accuracy_x0 latent_mean_gap".split(),
    *"kept_pairs implicit_accuracy rl_open skipped_updates".split(),
    *"held_out_reward held_out_clip_score held_out_prompt_accuracy".split(),
)
CHANCE = {"hinge": 2.0, "logistic": 2 * math.log(2)}  # d_loss of a D that cannot tell; DMD2's and AdvDMD's is logistic
RATIOS = {  # derived signals: one logged value over another
    "saturation_ratio": ("saturation", "saturation_real"),
    "contrast_ratio": ("contrast", "contrast_real"),
    "diversity_ratio": ("diversity", "diversity_teacher"),
    "watch_diversity_ratio": ("watch_diversity", "watch_diversity_teacher"),
}


@dataclass
class Run:
    """What the rules read of a run folder."""

    folder: Path
    config: dict
    rows: list  # of metrics.jsonl, {name: value}, with the signals of RATIOS
    bands: dict  # {signal: {"low": [], "high": []}}, at the tenths of a run; empty for other models than the toy's

    @property
    def last(self):
        """The newest value of everything that was logged."""
        return {k: v for row in self.rows for k, v in row.items()}

    @property
    def loops(self):
        return int(self.last["loops"])

    def points(self, signal):
        """[(progress in [0, 1], value)] of a signal's finite values."""
        total = self.config["iterations"]
        known = [(row["loops"] / total, row[signal]) for row in self.rows if signal in row]
        return [(p, v) for p, v in known if math.isfinite(v) and (v > 0 or signal in LINEAR)]


# ------------------------------------------------------------------------------------------------ reading


def read(folder):
    """A run folder -> Run. Raises UserError where it is none, and for a metrics.jsonl that cannot be read."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a run folder, runs/NAME")
    for needed in (folder / "config.json", path):
        if not needed.is_file():
            raise UserError(f"{folder} is not a run folder: it has no {needed.name}")
    config = settings(folder)
    if config["stage"] == "reward":
        raise UserError(f"{folder} trained a reward model (--stage reward): there are rules for stages 1 and 2 alone")
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    rows = [row(line, f"{path} line {n}", n == len(lines)) for n, line in enumerate(lines, 1)]
    rows = [with_ratios(r, config) for r in rows if r]
    if not rows:
        raise UserError(f"{path} is empty: nothing is logged before loop {config['log_every']} (--log-every)")
    bands = json.loads(BANDS.read_text()) if BANDS.is_file() else {}
    return Run(folder, config, rows, bands.get(kind(config), {}))


def settings(folder):
    """config.json over the defaults. Raises UserError for what no run has written."""
    path = folder / "config.json"
    try:
        what = "" if isinstance(json.loads(path.read_text()), dict) else "it holds no settings"
    except (OSError, ValueError) as e:
        what = f"it is torn: {e}"
    config = asdict(Config()) | {"rl_after": 0} | (saved_settings(folder) if not what else {})
    least = {"iterations": 1, "log_every": 1, "rl_after": 0, "gan_weight": 0}
    wrong = [k for k, low in least.items() if not isinstance(config[k], int | float) or not config[k] >= low]
    wrong += [k for k in ("model", "data", "method", "gan_loss") if not isinstance(config[k], str)]
    wrong += ["stage"] * (config["stage"] not in (1, 2, "reward"))
    what = what or "".join(f"{k} is {config[k]!r}" for k in wrong[:1])
    if what:
        raise UserError(f"{path} is no run's ({what}): give a folder that train.py wrote")
    return config


def row(line, place, last=False):
    """A line of metrics.jsonl -> its {name: number}; {} for an empty line and a torn last one. Raises UserError."""
    if not line.strip():
        return {}
    try:
        values = json.loads(line)
    except ValueError:
        if last:
            return {}
        raise UserError(f"{place} is torn: delete that line") from None
    try:
        values = {name: float(value) for name, value in values.items()}
        if math.isfinite(values["loops"]):
            return values
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{place} is not a line of a run's log: numbers by name, `loops` among them")


def with_ratios(values, config):
    """A row with its derived signals."""
    values = dict(values)
    for name, (above, below) in RATIOS.items():
        if values.get(below):
            values[name] = values.get(above, math.nan) / values[below]
    if "d_loss" in values:
        values["d_loss_ratio"] = values["d_loss"] / CHANCE["hinge" if hinge(config) else "logistic"]
    return values


def hinge(config):
    return config["method"] == "flash" and config["gan_loss"] == "hinge"


def kind(config):
    """What a run must share with those of its bands: the toy's model and the stage; None where it has no bands."""
    model = Path(config["model"])
    if model.parent.name != "toy" or config["data"] != "toy" or config["method"] != "flash" or config.get("teacher"):
        return None
    return f"{model.name}, stage {config['stage']}"


# -------------------------------------------------------------------------------------------- what rules see


def average(values, signal):
    """Their mean; the geometric one for a signal that is a ratio or a size. NaN of nothing."""
    if not values:
        return math.nan
    return mean(values) if signal in LINEAR else math.exp(mean(map(math.log, values)))


def window(run, signal):
    """The second half of a signal's points; [] where that is fewer than LEAST."""
    points = run.points(signal)
    half = points[len(points) // 2 :]
    return half if len(half) >= LEAST else []


def late(run, signal):
    """The average of the second half of what is logged of a signal; NaN where there is too little."""
    return average([v for _, v in window(run, signal)], signal)


def most(run, signal, high):
    """What the second half of a signal should not exceed: its band where the run has one; else `high`."""
    band, points = run.bands.get(signal), window(run, signal)
    if not band or not points:
        return high
    tenths = len(band["high"])
    return average([band["high"][min(max(int(p * tenths), 0), tenths - 1)] for p, _ in points], signal)
