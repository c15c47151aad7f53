"""Run folders: their checkpoints, the newest run, and what a new run may overwrite. Nothing here loads torch.

runs/NAME/config.json        every setting
runs/NAME/launch             the id of the torchrun that started it last
runs/NAME/lock               of engine/locks.py: held by the run's rank 0
runs/NAME/checkpoint-000400/ of engine/checkpoint.py
runs/NAME/metrics.jsonl, tensorboard/, preview-*.png   of engine/monitor.py
"""

import dataclasses
import json
import os
import shutil
from datetime import datetime
from pathlib import Path

from engine import base_model, layouts, reward_layout, text
from engine.config import flag
from engine.errors import UserError
from engine.folders import HERE, check_holds, check_sam, check_writable
from engine.locks import check_free, lock, unlock
from engine.parts import vae_factor
from engine.sd3 import t5_of

SHIPPED = HERE / "toy" / "student"  # unet/ and config.json of a student for those who have trained none

FIXED = (  # settings that a resumed run cannot change; the last line is the siblings'
    *("stage", "model", "teacher", "data", "prompts", "method", "lora_rank", "quantize_frozen", "optimizer"),
    *("t5", "text_length", "sam", "student_steps", "resolution", "seed", "batch_size"),
    *("fake_lora", "lora_layers", "judge", "head", "d_block"),
)
SHARED = (  # settings that stage 2 must have as its stage-1 run
    *("model", "teacher", "t5", "text_length", "resolution", "student_steps", "method"),
    *("lora_rank", "head", "d_block"),
)


def look(config):
    """Check settings and folders before anything is loaded -> the config, in stage 2 with --init and --reward.

    Raises UserError for values that do not fit, a missing model, data or SAM folder, a stage 1 that does not fit, and a
    run folder in use.
    """
    config.check()
    if config.dry_run:
        return config
    base_model.check(config.model)
    base_model.check_settings(config, base_model.family_of(config.model), vae_factor(config.model))
    if config.teacher:
        base_model.check_teacher(config.teacher, config.model)
    config = dataclasses.replace(config, t5=t5_of(config.model, config.t5))
    if config.t5 == "off" and config.text_length != type(config).text_length and not config.resume:
        raise UserError(f"--text-length {config.text_length} is T5's, which is not there or off")
    if config.cache_text:
        check_holds(config.cache_text, "text-", "--cache-text")
    if config.cache_latents and Path(config.cache_latents).is_file():
        raise UserError(f"--cache-latents {config.cache_latents} is a file: give a folder")
    if config.stage == "reward":
        reward_layout.kind_for(config.model)
        layouts.pairs(config.pairs)
    elif config.data != "toy":
        layouts.check(config.data)
    if config.prompts:
        text.prompts(config.prompts)
    if config.watch:
        text.prompts(config.watch, "--watch")
        if config.reward not in ("", "clip"):
            reward_layout.check(config.reward, config.model)
    if config.method == "flash" and config.gan_weight and config.stage != "reward":
        check_sam(config.sam)
    if config.stage == 2:
        config = from_stage_1(config)
    if int(os.environ.get("RANK", 0)) == 0:  # the other ranks could find the folder that rank 0 has just made
        if config.out or config.resume:
            why = refusal(config, Path(config.out))
            if why:
                raise UserError(why)
            check_free(Path(config.out) / "lock")
        check_writable(config.out or "runs", "--out")
    return config


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
        there = ", ".join(str(int(p.name[11:])) for p in checkpoints(run))
        raise UserError(f"{run} has no checkpoint of loop {loops}, only of {there}")
    return path


def find_run(name="", stage=None):
    """A run folder with a student's checkpoint, and its settings as a dict: the named run, or the newest under runs/.

    stage: only runs of this stage. Raises UserError where there is none, and where the named run's settings are torn.
    """
    found = []
    for run in [Path(name)] if name else Path("runs").glob("*"):
        if not (run / "config.json").is_file() or not newest(run):
            continue
        try:
            settings = saved_settings(run)
        except UserError:
            if name:
                raise
            continue
        if settings["stage"] == stage or stage is None and settings["stage"] != "reward":
            found.append((run, settings))
    if not found:
        kind = f"stage-{stage} checkpoint" if stage else "checkpoint"
        what = f"{name} holds no {kind}" if name else f"no run with a {kind} under runs/"
        raise UserError(f"{what}: train one first (python train.py --stage 1)")
    return max(found, key=lambda pair: (newest(pair[0]) / "progress.json").stat().st_mtime)


def find_student(name="", loops=None):
    """A student to draw with -> the folder of its network, and its run's settings as a dict.

    The named run's or the newest under runs/, at its newest checkpoint or that of `loops`; the shipped student where it
    is named, or where no run is named and there is none (then a line says so). Raises UserError as find_run and
    checkpoint_at do.
    """
    try:
        run, settings = find_run(name)
    except UserError:
        settings = saved_settings(SHIPPED)
        named = name and Path(name).resolve() == SHIPPED.resolve()
        if name and not named or loops or not settings or not (SHIPPED / "unet").is_dir():
            raise
        if not named:
            print(f"no trained run under runs/: drawing with the student that comes along, {SHIPPED}")
        return SHIPPED, settings
    return checkpoint_at(run, loops), settings


def run_of(student):
    """The run folder of a student's folder; runs/ for the shipped one, whose own folder stays as it is."""
    return Path("runs") if student == SHIPPED else student.parent


def student_at(path):
    """A student's folder, as settings.json of its pictures names it -> the folder, its run's settings.

    Raises UserError where it is gone.
    """
    student = Path(path)
    settings = saved_settings(student if student == SHIPPED else student.parent)
    if not student.is_dir() or not settings:
        raise UserError(f"{student}, which drew the first of the pictures, is gone: give another --out")
    return student, settings


def made_at(student):
    """When a student's folder was written: another run may have the same name."""
    return (student / ("config.json" if student == SHIPPED else "progress.json")).stat().st_mtime


def saved_settings(run):
    """The settings in a run folder's config.json as a dict; {} where there is no such file.

    Older runs have `gan` in place of `method`, and no T5. Raises UserError where the file is torn.
    """
    path = Path(run or "", "config.json")
    if not run or not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is torn: give another --out, or --overwrite and its settings as flags") from None
    if "method" not in settings:
        settings["method"] = method_before(settings)
        settings.pop("gan", None)
    settings["t5"] = settings.get("t5") or "off"  # runs of before --t5 had none
    return settings


def method_before(settings):
    """The method of a run saved before --method existed, from its `gan` and DMDR's settings."""
    gan = settings.get("gan", "pixel")
    if gan in ("latent", "online"):
        return {"latent": "dmd2", "online": "advdmd"}[gan]
    return "dmdr" if settings.get("fake_lora") or settings.get("reward_weight") else "flash"


def from_stage_1(config):
    """Stage 2's config with --init and --reward filled in. Raises UserError for a stage-1 run that does not fit."""
    reward_layout.kind_for(config.model)
    run, before = find_run(config.init, stage=1)
    before = dataclasses.asdict(type(config)()) | before
    for key in SHARED:
        if before.get(key) != getattr(config, key, None):
            how = f"{flag(key)} {before[key]}"
            raise UserError(f"{run} was trained with {how}, not {getattr(config, key)}: pass {how}")
    if config.gan_weight and not before["gan_weight"]:
        raise UserError(f"{run} was trained without a GAN: pass --gan-weight 0")
    return dataclasses.replace(config, init=str(run), reward=reward_layout.reward_folder(config))


def open_run(config):
    """The run folder, made or re-opened, and held until close_run; rank 0 alone calls this.

    Raises UserError where it is in use.
    """
    run = Path(config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    why = refusal(config, run)
    if why:
        raise UserError(why)
    check_writable(run, "--out")
    if run.exists():
        lock(run / "lock")
    if config.overwrite and not config.resume:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    lock(run / "lock")
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch:
        (run / "launch").write_text(launch)
    return run


def close_run(run):
    """Let other processes go on with a run folder."""
    unlock(run / "lock")


def write_config(run, config):
    """config.json, written aside and renamed: a kill leaves the old one or the new."""
    aside = run / "config.json.tmp"
    aside.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    aside.rename(run / "config.json")


def refusal(config, run):
    """Why this run folder cannot be used, in one line; None where it can."""
    if config.resume and not config.out:
        return "--resume needs --out, the run folder to go on with"
    if run.exists() and not run.is_dir():
        return f"{run} is a file: give another --out"
    if config.resume:
        return cannot_resume(config, run)
    if begun(run):
        if not config.overwrite:
            return f"{run} is not empty: pass --resume to go on, or --overwrite to replace it"
        if not (run / "config.json").exists():
            return f"{run} is not a run folder (it has no config.json): --overwrite will not delete it"
    return None


def begun(run):
    """Whether a folder holds more than what open_run leaves in a new one."""
    return run.exists() and any(path.name not in ("launch", "lock", "config.json.tmp") for path in run.iterdir())


def cannot_resume(config, run):
    """Why a run cannot go on with these settings, in one line; None where it can."""
    if not begun(run):
        return None  # so that a job script can always pass --resume
    if not (run / "config.json").exists():
        return f"nothing to resume in {run}: it has no config.json"
    before = dataclasses.asdict(type(config)()) | saved_settings(run)
    for key in FIXED:
        old = before.get(key)
        new = getattr(config, key, old)
        if old != new and Path(str(old)).resolve() != Path(str(new)).resolve():
            return f"{run} was trained with {flag(key)} {old}, not {new}: resume it with its own"
    if bool(before["gan_weight"]) != bool(config.gan_weight):
        return f"{run} was trained with --gan-weight {before['gan_weight']}: --resume cannot switch its GAN on or off"
    loops = progress_of(newest(run)).get("loops", 0)
    if loops > config.iterations:
        return f"{run} has done {loops} loops already: --iterations {config.iterations} is fewer, give more to go on"
    now = int(os.environ.get("WORLD_SIZE", 1))
    ranks = progress_of(newest(run)).get("ranks") or now
    if config.optimizer == "adamw8bit" and ranks != now:
        return f"{run} was trained on {ranks} ranks, not {now}: with --optimizer adamw8bit it goes on with as many"
    return None


def what_next(run, stage):
    """The last line that a command prints: where its result is, and how to use it or to go on."""
    made = newest(run)
    progress = progress_of(made)
    loops = progress.get("loops", 0)
    asked_for = saved_settings(run)["iterations"]
    if loops < asked_for:
        again = f"python train.py --resume --out {run}"
        return f"stopped after loop {loops} of {asked_for}, saved in {made}; go on with: {again}"
    if stage == "reward":
        return f"reward model in {made}/lrm; use it with: python train.py --stage 2 --reward {made}/lrm"
    if not progress.get("generator_updates") and not progress.get("rl_updates"):
        return f"G has not moved: the student in {made} is still what it started as"
    return f"student in {made}; sample it with: python sample.py --run {run}"


def progress_of(made):
    """The counters of a checkpoint folder, a dict; {} where it has none, is torn or does not exist."""
    try:
        return dict(json.loads((made / "progress.json").read_text()))
    except (TypeError, OSError, ValueError):
        return {}
