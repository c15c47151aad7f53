"""Save and resume: torch.distributed.checkpoint, written aside and renamed, so that a killed run leaves a whole one.

    runs/NAME/checkpoint-000400/state/        weights and optimizers, sharded as they were
    runs/NAME/checkpoint-000400/unet/         the student, as diffusers loads it
    runs/NAME/checkpoint-000400/progress.json counters

Randomness and data follow from (seed, iteration), so nothing else needs saving.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from models import UserError


def newest(run):
    """The newest checkpoint folder of a run, or None."""
    found = sorted(Path(run).glob("checkpoint-[0-9]*[0-9]"))
    return found[-1] if found else None


def save(run, players, progress):
    """Write a checkpoint of players {name: (module, optimizer)} and progress (a dict with "loops"); older ones are then removed.

    All ranks call it. players["G"] is also written as a diffusers folder.
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
    whole = get_model_state_dict(players["G"][0], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if first:
        save_diffusers(aside / "unet", players["G"][0], whole)
        (aside / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in Path(run).glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)
    barrier()


def load(path, players, optimizers=True):
    """Fill players {name: (module, optimizer)} from a checkpoint folder and return its progress; without `optimizers`, modules alone."""
    state = _state(players, optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=Path(path) / "state", no_dist=not dist.is_initialized())
    for name, (module, optimizer) in players.items():
        if "model" in state[name]:
            set_model_state_dict(module, state[name]["model"])
        if optimizers:
            set_optimizer_state_dict(module, optimizer, state[name]["optimizer"])
    return json.loads((Path(path) / "progress.json").read_text())


def save_diffusers(path, net, weights):
    """A diffusers model folder: config.json and fp32 safetensors."""
    path.mkdir(parents=True)
    config = dict(net.config) | {"_class_name": "UNet2DConditionModel"}
    (path / "config.json").write_text(json.dumps(config, indent=2, default=list))
    save_file({k: v.contiguous() for k, v in weights.items()}, path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _state(players, optimizers=True):
    out, seen = {}, []
    for name, (module, optimizer) in players.items():
        out[name] = {"optimizer": get_optimizer_state_dict(module, optimizer)} if optimizers else {}
        if module not in seen:  # in stage 2 the generator has two optimizers
            out[name]["model"] = get_model_state_dict(module)
            seen.append(module)
    return out


def barrier():
    if dist.is_initialized():
        dist.barrier()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------ finding a trained student


def find_run(name="", stage=None):
    """A run folder that holds a checkpoint: the named one, or else the newest under runs/ (of one stage). -> (folder, its config as a dict)."""
    runs = [Path(name)] if name else Path("runs").glob("*")
    whole = [p for p in runs if (p / "config.json").is_file() and newest(p)]
    if stage is not None:
        whole = [p for p in whole if json.loads((p / "config.json").read_text())["stage"] == stage]
    whole.sort(key=lambda p: (newest(p) / "progress.json").stat().st_mtime)
    if not whole:
        kind = f"stage-{stage} checkpoint" if stage else "checkpoint"
        what = f"{name} holds no {kind}" if name else f"no run with a {kind} under runs/"
        raise UserError(f"{what}: train one first (python train.py --stage 1)")
    return whole[-1], json.loads((whole[-1] / "config.json").read_text())
