"""Run folders: which checkpoints one holds, the newest run, and what a new run may write over.

runs/NAME/config.json        every setting
runs/NAME/launch             which torchrun started it last
runs/NAME/checkpoint-000400/ checkpoint.py's
runs/NAME/metrics.jsonl, tensorboard/, preview-*.png   monitor.py's
"""

import dataclasses
import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from config import Config
from models import UserError, part_of

DEFAULTS = dataclasses.asdict(Config())  # a run of before a setting existed had its default
FIXED = ("stage", "model", "data", "prompts", "gan", "lora_rank", "fake_lora", "optimizer", "judge")  # what a resumed run cannot change
FIXED += ("sam", "student_steps", "resolution", "seed", "batch_size")


def checkpoints(run):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(run).glob("checkpoint-[0-9]*[0-9]"))


def newest(run):
    """The newest checkpoint folder of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def checkpoint_at(run, loops=None):
    """A run's checkpoint of a loop, by default the newest. Raises UserError where there is none."""
    path = newest(run) if loops is None else Path(run) / f"checkpoint-{loops:06d}"
    if not path.is_dir():
        raise UserError(f"{run} has no checkpoint of loop {loops}, only of {', '.join(str(int(p.name[11:])) for p in checkpoints(run))}")
    return path


def find_run(name="", stage=None):
    """A run folder with a student's checkpoint: the named one, or the newest under runs/ (of one stage). -> (folder, its config as a dict)."""
    whole = []
    for run in [Path(name)] if name else Path("runs").glob("*"):
        if (run / "config.json").is_file() and newest(run):
            try:
                config = json.loads((run / "config.json").read_text())
            except ValueError:
                if name:
                    raise UserError(f"cannot read {run / 'config.json'}: it is torn") from None
                continue
            if config["stage"] == stage or (stage is None and config["stage"] != "reward"):
                whole.append((run, config))
    if not whole:
        kind = f"stage-{stage} checkpoint" if stage else "checkpoint"
        what = f"{name} holds no {kind}" if name else f"no run with a {kind} under runs/"
        raise UserError(f"{what}: train one first (python train.py --stage 1)")
    return max(whole, key=lambda found: (newest(found[0]) / "progress.json").stat().st_mtime)


def from_stage_1(config):
    """The config of a stage-2 run, naming the stage-1 run it starts from: --init, or the newest. Raises UserError for one that does not fit."""
    run, before = find_run(config.init, stage=1)
    before = DEFAULTS | before
    for key in ("model", "resolution", "student_steps", "gan", "lora_rank"):
        if before[key] != getattr(config, key):
            raise UserError(f"{run} was trained with --{key.replace('_', '-')} {before[key]}, not {getattr(config, key)}")
    if config.gan_weight and not before["gan_weight"]:
        raise UserError(f"{run} was trained without a GAN: pass --gan-weight 0")
    return dataclasses.replace(config, init=str(run), reward=reward_folder(config))


def reward_folder(config):
    """The latent reward model's folder: --reward, or "lrm" beside the model. Raises UserError where there is none."""
    if not config.reward and part_of(config.model) == "transformer":
        raise UserError("there is no latent reward model for SD3: name a folder of your own with --reward")
    reward = config.reward or str(Path(config.model).parent / "lrm")
    if not any((root / reward).is_dir() for root in (Path(), Path(__file__).parent)):
        raise UserError(f"no latent reward model in {reward}: name its folder with --reward")
    return reward


def open_run(config, rank):
    """The run folder, made or re-opened. Refuses to touch what it was not told to. Rank 0 looks; all ranks learn what it found."""
    answer = [None, None]
    if rank == 0:
        run = Path(config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
        answer = [str(run), refusal(config, run)]
        if not answer[1]:
            if config.overwrite and not config.resume:
                shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True, exist_ok=True)
            if name := os.environ.get("TORCHELASTIC_RUN_ID"):
                (run / "launch").write_text(name)
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return Path(answer[0])


def write_config(run, config):
    """config.json, written aside and renamed: a kill leaves the old one or the new."""
    aside = run / "config.json.tmp"
    aside.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    aside.rename(run / "config.json")


def refusal(config, run):
    """Why this run folder cannot be used as asked, in one line; None where it can."""
    if config.resume and not config.out:
        return "--resume needs --out, the run folder to go on with"
    if run.exists() and not run.is_dir():
        return f"{run} is a file: give another --out"
    saved = run / "config.json"
    if config.resume:
        if not run.exists() or not any(path.name not in ("launch", "config.json.tmp") for path in run.iterdir()):
            return None  # so that a restarted job may always say --resume
        if not saved.exists():
            return f"nothing to resume in {run}: it has no config.json"
        try:
            before = DEFAULTS | json.loads(saved.read_text())
        except ValueError:
            return f"{saved} is torn: give another --out, or --overwrite to start anew"
        for key in FIXED:
            old, new = before[key], getattr(config, key)
            if old != new and Path(str(old)).resolve() != Path(str(new)).resolve():
                return f"{run} was trained with --{key.replace('_', '-')} {old}, not {new}: resume it with its own"
        if bool(before["gan_weight"]) != bool(config.gan_weight):
            return f"{run} was trained with --gan-weight {before['gan_weight']}: its GAN cannot be switched on or off by --resume"
        now = int(os.environ.get("WORLD_SIZE", 1))
        if config.optimizer == "adamw8bit" and (ranks := ranks_of(newest(run)) or now) != now:
            return f"{run} was trained on {ranks} ranks, not {now}: with --optimizer adamw8bit it goes on with as many"
    elif run.exists() and any(run.iterdir()):
        if not config.overwrite:
            return f"{run} is not empty: pass --resume to go on, or --overwrite to replace it"
        if not saved.exists():
            return f"{run} is not a run folder (it has no config.json): --overwrite will not delete it"


def ranks_of(made):
    """On how many ranks a checkpoint was made; None where it does not say, is torn or is not there."""
    try:
        return json.loads((made / "progress.json").read_text()).get("ranks")
    except (TypeError, OSError, ValueError):
        return None
