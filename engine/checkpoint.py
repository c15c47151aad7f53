"""Save and resume with torch.distributed.checkpoint. A checkpoint is written aside and renamed: a kill leaves it whole.

    runs/NAME/checkpoint-000400/state/        weights and optimizers, sharded as they were
    runs/NAME/checkpoint-000400/unet/         the student, as diffusers loads it
    runs/NAME/checkpoint-000400/progress.json counters

Noise and data are functions of (seed, iteration): nothing else needs saving.
"""

import json
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from engine.base_model import family_of_net
from engine.distributed import barrier, together
from engine.errors import UserError
from engine.folders import first_line
from engine.models import LORA, gigabytes, waiting
from engine.run_folder import checkpoints, newest
from engine.safe_load import Planner, Reader

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # the frozen network under a LoRA is not saved
_WRITER = ThreadPoolExecutor(1)  # for checkpoints that are written in the background
_PENDING = []


def save(run, players, progress, keep=1, write=None, background=False):
    """Write a checkpoint of players {name: (module, optimizer)} and progress (a dict with "loops"). All ranks call it.

    keep: how many checkpoints stay. write(folder, module, weights): writes the first player on rank 0, by default as a
    diffusers model. background: return once all is copied to host memory, then write (needs a process group).
    """
    settle()
    final = Path(run) / f"checkpoint-{progress['loops']:06d}"
    aside = final.with_name(final.name + ".tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    counters = json.dumps(progress)  # now: the run counts on while this is written in the background

    def begin():
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            with _writing(aside):
                aside.mkdir(parents=True)

    together(begin)
    module = next(iter(players.values()))[0]
    lora = "student" in getattr(module, "peft_config", {})  # the frozen network under it need not be gathered
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=lora)
    whole = get_model_state_dict(module, options=options)

    def finish(written):  # the states are whole on all ranks once `written` has returned
        with _writing(aside):
            written()
            if not first:
                return
            (write or save_student)(aside, module, whole)
            (aside / "progress.json").write_text(counters)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in checkpoints(run)[:-keep]:
                shutil.rmtree(old)
            for torn in Path(run).glob("checkpoint-*.tmp"):
                shutil.rmtree(torn)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of no_dist, which is right for one process
        if background:
            states = dcp.async_save(_state(players), checkpoint_id=aside / "state", process_group=_group())
            _PENDING.append(_WRITER.submit(finish, states.result))
        else:
            state = _state(players)
            write_state = partial(dcp.save, state, checkpoint_id=aside / "state", no_dist=not dist.is_initialized())
            trained = {p for module, _ in players.values() for p in module.parameters() if p.requires_grad}
            with waiting(f"writing {final.name}", sum(p.numel() for p in trained) * 12 / 1e9):  # with AdamW's moments
                together(lambda: finish(write_state))


@contextmanager
def _writing(aside):
    """A disk's errors as a UserError; what is written of checkpoint folder `aside` is deleted to make room."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as e:
        causes = [cause for cause, _ in getattr(e, "failures", {}).values()] or [e]
        why = _disk_error(causes[0])
        if why is None:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        run = aside.parent
        whole = f"{newest(run).name} is whole" if newest(run) else "there is none before it"
        remedy = f"make room, and go on with --resume --out {run}"
        raise UserError(f"cannot save {aside.stem} in {run} ({why}): {whole}; {remedy}") from None


def _disk_error(error):
    """What the disk said, where an error comes from it; None otherwise."""
    if "inline_container" in str(error):  # torch's own writer, after a write that failed
        return "the disk takes no more"
    while error:
        if isinstance(error, OSError | SafetensorError):
            return getattr(error, "strerror", None) or first_line(error)
        error = error.__cause__ or error.__context__
    return None


@cache
def _group():
    """A group for the writer alone: in training's, the order of collectives could differ between ranks."""
    return dist.new_group(backend="gloo")


def settle():
    """Wait for the checkpoint that is written in the background. Raises UserError where it could not be written."""
    while _PENDING:
        together(_PENDING.pop().result)


def restore(run, players, optimizers=True):
    """Fill players from the newest readable checkpoint of a run -> its progress.

    Newer, unreadable ones are renamed to checkpoint-N.unreadable, with a warning. Raises UserError where all are.
    """
    torn = []
    for path in reversed(checkpoints(run)):
        try:
            progress = load(path, players, optimizers)
        except (Exception, dcp.CheckpointException) as e:  # torch, json and the file system each raise their own
            causes = [cause for cause, _ in getattr(e, "failures", {}).values()] or [e]
            torn.append((path, first_line(causes[0])))
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
    """Fill players {name: (module, optimizer)} from a checkpoint folder -> its progress.

    optimizers=False: modules alone.
    """
    state = _state(players, optimizers)
    reader = Reader(Path(path) / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with waiting(f"reading {path}", gigabytes(path)):
            dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=not dist.is_initialized())
    for name, (module, optimizer) in players.items():
        if "model" in state[name]:
            set_model_state_dict(module, state[name]["model"], options=TRAINED)
        if optimizers:
            set_optimizer_state_dict(module, optimizer, state[name]["optimizer"])
    return json.loads((Path(path) / "progress.json").read_text())


def save_student(path, net, weights):
    """Write a student for diffusers: path/unet or path/transformer; a LoRA to path/lora, for load_lora_weights."""
    family = family_of_net(net)
    name = family.PART
    if "student" in getattr(net, "peft_config", {}):
        lora = get_peft_model_state_dict(net, weights, "student")
        (path / "lora").mkdir()
        lora = {f"{name}.{k}": v.contiguous() for k, v in lora.items()}
        return save_file(lora, path / "lora" / LORA, metadata={"format": "pt"})
    (path / name).mkdir()
    config = dict(net.config) | {"_class_name": family.NETWORK}
    (path / name / "config.json").write_text(json.dumps(config, indent=2, default=list))
    whole = {k: v.contiguous() for k, v in weights.items()}
    save_file(whole, path / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _state(players, optimizers=True):
    out = {}
    seen = []
    for name, (module, optimizer) in players.items():
        out[name] = {}
        if optimizers:
            never_stepped = not optimizer.state
            out[name]["optimizer"] = get_optimizer_state_dict(module, optimizer)
            if never_stepped:  # torch has made its state by a step without gradients, and counted it
                for state in optimizer.state.values():
                    state["step"].zero_()
        if module not in seen:  # in stage 2 the generator has two optimizers, so it is in `players` twice
            out[name]["model"] = get_model_state_dict(module, options=TRAINED)
            seen.append(module)
    return out
