"""Save and resume: torch.distributed.checkpoint, written aside and renamed, so that a killed run leaves a whole one.

    runs/NAME/checkpoint-000400/state/        weights and optimizers, sharded as they were
    runs/NAME/checkpoint-000400/unet/         the student, as diffusers loads it
    runs/NAME/checkpoint-000400/progress.json counters

Randomness and data follow from (seed, iteration), so nothing else needs saving.
"""

import dataclasses
import json
import shutil
import sys
import warnings
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from config import Config
from models import PARTS, UserError, part_name, part_of

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what a LoRA stands on is the model's own, and is not saved again
DEFAULTS = dataclasses.asdict(Config())  # a run of before a setting existed had its default


def checkpoints(run):
    """The checkpoint folders of a run, oldest first."""
    return sorted(Path(run).glob("checkpoint-[0-9]*[0-9]"))


def newest(run):
    """The newest checkpoint folder of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def save(run, players, progress, keep=1, export=None):
    """Write a checkpoint of players {name: (module, optimizer)} and progress (a dict with "loops"); then all but the `keep` newest are removed.

    All ranks call it. export(folder, module, weights) writes, on rank 0, what others load of the first player; a diffusers model by default.
    """
    final = Path(run) / f"checkpoint-{progress['loops']:06d}"
    aside = final.with_name(final.name + ".tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is what no_dist means
        dcp.save(_state(players), checkpoint_id=aside / "state", no_dist=not dist.is_initialized())
    module = next(iter(players.values()))[0]
    whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if first:
        (export or save_student)(aside, module, whole)
        (aside / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
        for torn in Path(run).glob("checkpoint-*.tmp"):
            shutil.rmtree(torn)
    barrier()


def restore(run, players, optimizers=True):
    """Fill players from the newest checkpoint of a run that can be read -> its progress.

    Newer ones that cannot are then set aside as checkpoint-N.unreadable, with a warning. Raises UserError where none can be read.
    """
    torn = []
    for path in reversed(checkpoints(run)):
        try:
            progress = load(path, players, optimizers)
        except (Exception, dcp.CheckpointException) as e:  # torch, json and the file system have errors of their own; every rank sees one
            causes = [cause for cause, _ in getattr(e, "failures", {}).values()] or [e]
            torn.append((path, str(causes[0]).strip().split("\n")[0] or type(causes[0]).__name__))
            continue
        barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
            for old, why in torn:
                print(f"warning: cannot read {old} ({why}): going on from {path.name}", file=sys.stderr)
                shutil.rmtree(old.with_suffix(".unreadable"), ignore_errors=True)
                old.rename(old.with_suffix(".unreadable"))
        barrier()
        return progress
    raise UserError(f"cannot read {torn[0][0]} ({torn[0][1]}), and no other checkpoint of {run} either")


def load(path, players, optimizers=True):
    """Fill players {name: (module, optimizer)} from a checkpoint folder and return its progress; without `optimizers`, modules alone."""
    state = _state(players, optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=Path(path) / "state", no_dist=not dist.is_initialized())
    for name, (module, optimizer) in players.items():
        if "model" in state[name]:
            set_model_state_dict(module, state[name]["model"], options=TRAINED)
        if optimizers:
            set_optimizer_state_dict(module, optimizer, state[name]["optimizer"])
    return json.loads((Path(path) / "progress.json").read_text())


def save_student(path, net, weights):
    """What diffusers loads: a model folder, path/unet or path/transformer; of a LoRA student path/lora, for a pipeline's load_lora_weights."""
    name = part_name(net)
    if "student" in getattr(net, "peft_config", {}):
        lora = get_peft_model_state_dict(net, weights, "student")
        (path / "lora").mkdir()
        lora = {f"{name}.{k}": v.contiguous() for k, v in lora.items()}
        return save_file(lora, path / "lora" / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    (path / name).mkdir()
    config = dict(net.config) | {"_class_name": PARTS[name].__name__}
    (path / name / "config.json").write_text(json.dumps(config, indent=2, default=list))
    save_file({k: v.contiguous() for k, v in weights.items()}, path / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _state(players, optimizers=True):
    out, seen = {}, []
    for name, (module, optimizer) in players.items():
        out[name] = {"optimizer": get_optimizer_state_dict(module, optimizer)} if optimizers else {}
        if module not in seen:  # in stage 2 the generator has two optimizers
            out[name]["model"] = get_model_state_dict(module, options=TRAINED)
            seen.append(module)
    return out


def barrier():
    if dist.is_initialized():
        dist.barrier()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------- run folders


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
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return Path(answer[0])


def refusal(config, run):
    """Why this run folder cannot be used as asked, in one line; None where it can."""
    if config.resume and not config.out:
        return "--resume needs --out, the run folder to go on with"
    if run.exists() and not run.is_dir():
        return f"{run} is a file: give another --out"
    saved = run / "config.json"
    if config.resume:
        if not run.exists() or not any(run.iterdir()):
            return None  # so that a restarted job may always say --resume
        if not saved.exists():
            return f"nothing to resume in {run}: it has no config.json"
        try:
            before = DEFAULTS | json.loads(saved.read_text())
        except ValueError:
            return f"{saved} is torn: give another --out, or --overwrite to start anew"
        for key in ("stage", "model", "data", "prompts", "gan", "lora_rank", "fake_lora", "sam", "student_steps", "resolution", "seed", "batch_size"):
            old, new = before[key], getattr(config, key)
            if old != new and Path(str(old)).resolve() != Path(str(new)).resolve():
                return f"{run} was trained with --{key.replace('_', '-')} {old}, not {new}: resume it with its own"
        if bool(before["gan_weight"]) != bool(config.gan_weight):
            return f"{run} was trained with --gan-weight {before['gan_weight']}: its GAN cannot be switched on or off by --resume"
    elif run.exists() and any(run.iterdir()):
        if not config.overwrite:
            return f"{run} is not empty: pass --resume to go on, or --overwrite to replace it"
        if not saved.exists():
            return f"{run} is not a run folder (it has no config.json): --overwrite will not delete it"
