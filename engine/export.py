"""Export a student as a diffusers pipeline folder with a model card; a LoRA student also as its LoRA alone.

The folder's scheduler draws the student's steps: LCMScheduler with original_inference_steps = K for SDXL,
FlowMatchEulerDiscreteScheduler with stochastic_sampling for SD3. diffusers' configs hold no number of steps (SD3:
sigmas) and no guidance scale; these are on the card.
"""

import json
import shutil
from math import inf
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from transformers import CLIPTokenizer

from engine.errors import UserError
from engine.folders import check_new, folder, part_of
from engine.models import LORA, load_denoiser, load_part, waiting
from engine.run_folder import find_run, newest

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
    """Write the newest checkpoint of folder `run` as a pipeline into folder `out`, with a model card -> the folder.

    lora: write its LoRA, the scheduler and the card alone. Raises UserError for a run without a checkpoint or LoRA, and
    for an `out` in use.
    """
    run, config = find_run(run)
    out = Path(out)
    made = newest(run)
    check_new(out, "folder")
    if lora and not (made / "lora").is_dir():
        raise UserError(f"{run} has no LoRA (it was trained without --lora-rank): export it without --lora")
    model = folder(config["model"], "model_index.json")
    part = part_of(model)
    student = load_denoiser(model, student=made)  # raises UserError for a torn LoRA
    without = {"text_encoder_3": None, "tokenizer_3": None} if part == "transformer" else {}  # the student has no T5
    scheduler = student_scheduler(model, config["student_steps"])
    if lora:
        scheduler.save_pretrained(out / "scheduler")
        shutil.copy(made / "lora" / LORA, out)
    else:
        parts = {part: student.net, "scheduler": scheduler, **without}
        pipeline = DiffusionPipeline.from_pretrained(model, **parts, torch_dtype=torch.float32)
        with waiting(f"writing {out}", size=inf):
            pipeline.save_pretrained(out)
    names = {"model": config["model"], "scheduler": type(scheduler).__name__, "weights": LORA}
    missing = "".join(f", {name}=None" for name in without)
    load = (LOAD_LORA if lora else LOAD).format(**names, without=missing)
    (out / "README.md").write_text(card(run, made, config, load, student.schedule))
    return out


def student_scheduler(model, steps):
    """diffusers' scheduler for a student of pipeline folder `model`: its steps, re-noised as by backward_simulation."""
    if part_of(model) == "unet":
        return load_part(LCMScheduler, model, "scheduler", original_inference_steps=steps)
    return load_part(FlowMatchEulerDiscreteScheduler, model, "scheduler", stochastic_sampling=True)


def card(run, made, config, load, schedule):
    """The model card of checkpoint folder `made`. load: the code that makes `pipe`."""
    steps = config["student_steps"]
    call = f"num_inference_steps={steps}"
    shift = ""
    if schedule.prediction == "flow":  # sigmas before the shift; for the missing T5 as many zero tokens as CLIP's
        length = load_part(CLIPTokenizer, folder(config["model"]), "tokenizer").model_max_length
        call = f"sigmas={[n / steps for n in range(steps, 0, -1)]}, max_sequence_length={length}"
        shift = f"; node ModelSamplingSD3 with shift {schedule.shift:g}"
    measured = run / "metrics.json"
    metrics = f"Not measured (evaluate.py --json {measured})."
    if measured.is_file():
        metrics = f"```json\n{measured.read_text().strip()}\n```"
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
