"""Save, resume, export: torch.distributed.checkpoint, written aside and renamed, so that a killed run leaves a whole one.

    runs/NAME/checkpoint-000400/state/        weights and optimizers, sharded as they were
    runs/NAME/checkpoint-000400/unet/         the student, as diffusers loads it
    runs/NAME/checkpoint-000400/progress.json counters

Randomness and data follow from (seed, iteration), so nothing else needs saving.

    python checkpoint.py export RUN OUT [--lora]

writes the student as a pipeline folder with a model card; with --lora, of a LoRA student, its LoRA and scheduler alone, to be put
on the teacher's pipeline. The scheduler that draws its steps is baked in: LCMScheduler with original_inference_steps = K for SDXL,
FlowMatchEulerDiscreteScheduler with stochastic_sampling for SD3. What diffusers keeps outside of configs, the number of steps
(SD3: sigmas) and guidance 0, is on the card.
"""

import argparse
import json
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import CLIPTokenizer

from models import PARTS, UserError, folder, load_denoiser, load_part, part_name, part_of
from run_folder import checkpoints, find_run, newest
from safe_load import Planner, Reader

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what a LoRA stands on is the model's own, and is not saved again
LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
_WRITER, _PENDING = ThreadPoolExecutor(1), []  # for checkpoints that are written in the background


def save(run, players, progress, keep=1, write=None, background=False):
    """Write a checkpoint of players {name: (module, optimizer)} and progress (a dict with "loops"); then all but the `keep` newest are removed.

    All ranks call it. write(folder, module, weights) writes, on rank 0, what others load of the first player; a diffusers model by default.
    background: return once all is copied to host memory, and write it meanwhile (needs a process group).
    """
    settle()
    final = Path(run) / f"checkpoint-{progress['loops']:06d}"
    aside = final.with_name(final.name + ".tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    module = next(iter(players.values()))[0]
    lora = "student" in getattr(module, "peft_config", {})  # what that stands on is nobody's to gather
    whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=lora))

    def finish():  # the states are whole on all ranks
        if first:
            (write or save_student)(aside, module, whole)
            (aside / "progress.json").write_text(json.dumps(progress))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in checkpoints(run)[:-keep]:
                shutil.rmtree(old)
            for torn in Path(run).glob("checkpoint-*.tmp"):
                shutil.rmtree(torn)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is what no_dist means
        if background:
            states = dcp.async_save(_state(players), checkpoint_id=aside / "state", process_group=_group())
            _PENDING.append(_WRITER.submit(lambda: (states.result(), finish())))
        else:
            dcp.save(_state(players), checkpoint_id=aside / "state", no_dist=not dist.is_initialized())
            finish()
            barrier()


@cache
def _group():
    """The writer's own group: on the ranks' common one its collectives could meet those of training in another order on each rank."""
    return dist.new_group(backend="gloo")


def settle():
    """Wait until a checkpoint that is written in the background is there. Raises what its writing raised."""
    while _PENDING:
        _PENDING.pop().result()


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
        dcp.load(state, storage_reader=Reader(Path(path) / "state"), planner=Planner(), no_dist=not dist.is_initialized())
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
        return save_file(lora, path / "lora" / LORA, metadata={"format": "pt"})
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


# ------------------------------------------------------------------------------------------------- export

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {model}
---

# A {steps}-step student of {model}

Distilled with Flash-DMD (arXiv 2511.20549), stage {stage}: {loops} loops at batch {batch_size}.

```python
{load}
image = pipe("a prompt", {call}, guidance_scale=0, height={resolution}, width={resolution}).images[0]
```

- Steps: {steps}, at timesteps {timesteps}; the scheduler in this folder gives them for `{call}`.
- Guidance: none, `guidance_scale=0`. The teacher's guidance ({guidance:g}) is distilled into the weights.
- ComfyUI (untested): sampler "lcm", scheduler "sgm_uniform", {steps} steps, cfg 1{shift}.

## Metrics

{metrics}

## Settings

```json
{settings}
```
"""

LOAD = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER"{without})"""

LOAD_LORA = """import torch
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{model}", torch_dtype=torch.float32{without})
pipe.load_lora_weights("THIS_FOLDER", weight_name="{weights}")
pipe.scheduler = {scheduler}.from_pretrained("THIS_FOLDER", subfolder="scheduler")"""


def export(run, out, lora=False):
    """Write the newest checkpoint of folder `run` as a pipeline into folder `out`, with a model card; lora: its LoRA and scheduler alone.

    Raises UserError for a run without a checkpoint, or without a LoRA, and for an `out` in use.
    """
    run, config = find_run(run)
    out, made = Path(out), newest(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder")
    if lora and not (made / "lora").is_dir():
        raise UserError(f"{run} has no LoRA (it was trained without --lora-rank): export it without --lora")
    model = folder(config["model"], "model_index.json")
    part, student = part_of(model), load_denoiser(model, student=made)  # a torn LoRA shows here
    without = {"text_encoder_3": None, "tokenizer_3": None} if part == "transformer" else {}  # SD3's T5 has no part in training
    scheduler = student_scheduler(model, config["student_steps"])
    if lora:
        scheduler.save_pretrained(out / "scheduler")
        shutil.copy(made / "lora" / LORA, out)
    else:
        parts = {part: student.net, "scheduler": scheduler, **without}
        DiffusionPipeline.from_pretrained(model, **parts, torch_dtype=torch.float32).save_pretrained(out)
    names = {"model": config["model"], "scheduler": type(scheduler).__name__, "weights": LORA}
    load = (LOAD_LORA if lora else LOAD).format(**names, without="".join(f", {name}=None" for name in without))
    (out / "README.md").write_text(card(run, made, config, load, student.schedule))
    return out


def student_scheduler(model, steps):
    """diffusers' scheduler for the student of pipeline folder `model`: its few steps with re-noising, as backward_simulation draws them."""
    if part_of(model) == "unet":
        return load_part(LCMScheduler, model, "scheduler", original_inference_steps=steps)
    return load_part(FlowMatchEulerDiscreteScheduler, model, "scheduler", stochastic_sampling=True)


def card(run, made, config, load, schedule):
    """The model card of checkpoint folder `made`. load: the code that makes `pipe`."""
    steps, call, shift = config["student_steps"], f"num_inference_steps={config['student_steps']}", ""
    if schedule.prediction == "flow":  # sigmas before the shift; as many tokens of zeros as CLIP has stand for the missing T5
        length = load_part(CLIPTokenizer, folder(config["model"]), "tokenizer").model_max_length
        call = f"sigmas={[n / steps for n in range(steps, 0, -1)]}, max_sequence_length={length}"
        shift = f"; node ModelSamplingSD3 with shift {schedule.shift:g}"
    measured = run / "metrics.json"
    metrics = f"```json\n{measured.read_text().strip()}\n```" if measured.is_file() else f"Not measured (evaluate.py --json {measured})."
    return CARD.format(
        **{k: config[k] for k in ("model", "stage", "batch_size", "resolution", "guidance")},
        steps=steps,
        load=load,
        call=call,
        shift=shift,
        loops=json.loads((made / "progress.json").read_text())["loops"],
        timesteps=", ".join(f"{t:g}" for t in schedule.steps(steps).tolist()),
        metrics=metrics,
        settings=json.dumps(config, indent=2),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    export_ = parser.add_subparsers(required=True).add_parser("export", help="a run's student as a diffusers pipeline folder of its own")
    export_.add_argument("run", help="a run folder")
    export_.add_argument("out", help="a new folder")
    export_.add_argument("--lora", action="store_true", help="of a LoRA student, its LoRA, scheduler and model card alone")
    args = parser.parse_args()
    try:
        what = "LoRA, scheduler" if args.lora else "pipeline"
        print(f"{what} and model card in {export(args.run, args.out, args.lora)}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
