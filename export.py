"""A student as a diffusers pipeline folder of its own, with a model card: python export.py RUN OUT

The scheduler that draws the student's steps is baked in: LCMScheduler with original_inference_steps = K for SDXL, FlowMatchEulerDiscreteScheduler
with stochastic_sampling for SD3. What diffusers keeps outside of configs, the number of steps (SD3: sigmas) and guidance 0, is on the card.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler

import checkpoint
from models import UserError, folder, load_denoiser, load_schedule, part_of

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {model}
---

# A {steps}-step student of {model}

Distilled with Flash-DMD (arXiv 2511.20549), stage {stage}: {loops} loops at batch {batch_size}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER"{without})
image = pipe("a prompt", {call}, guidance_scale=0, height={resolution}, width={resolution}).images[0]
```

- Steps: {steps}, at timesteps {timesteps}; the scheduler in this folder gives them for `{call}`.
- Guidance: none, `guidance_scale=0`. The teacher's guidance ({guidance:g}) is distilled into the weights.
- ComfyUI (untested): sampler "lcm", scheduler "sgm_uniform", {steps} steps, cfg 1.

## Metrics

{metrics}

## Settings

```json
{settings}
```
"""


def export(run, out):
    """Write the newest checkpoint of folder `run` as a pipeline into folder `out`. Raises UserError for a run without one, or an `out` in use."""
    run, config = checkpoint.find_run(run)
    out, newest = Path(out), checkpoint.newest(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder")
    model = folder(config["model"], "model_index.json")
    part, steps = part_of(model), config["student_steps"]
    without = {"text_encoder_3": None, "tokenizer_3": None} if part == "transformer" else {}  # SD3's T5 has no part in training
    pipeline = DiffusionPipeline.from_pretrained(model, **{part: load_denoiser(model, student=newest).net}, **without, torch_dtype=torch.float32)
    if part == "unet":
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=steps)
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, stochastic_sampling=True)
    pipeline.save_pretrained(out)
    measured = run / "metrics.json"
    metrics = f"```json\n{measured.read_text().strip()}\n```" if measured.is_file() else f"Not measured (evaluate.py --json {measured})."
    call = f"num_inference_steps={steps}"
    if part == "transformer":  # sigmas before the shift; as many tokens of zeros as CLIP has stand for the missing T5
        call = f"sigmas={[n / steps for n in range(steps, 0, -1)]}, max_sequence_length={pipeline.tokenizer.model_max_length}"
    card = CARD.format(
        **{k: config[k] for k in ("model", "stage", "batch_size", "resolution", "guidance")},
        steps=steps,
        call=call,
        without="".join(f", {name}=None" for name in without),
        loops=json.loads((newest / "progress.json").read_text())["loops"],
        timesteps=", ".join(f"{t:g}" for t in load_schedule(config["model"]).steps(steps).tolist()),
        metrics=metrics,
        settings=json.dumps(config, indent=2),
    )
    (out / "README.md").write_text(card)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder")
    parser.add_argument("out", help="a new folder")
    args = parser.parse_args()
    try:
        print(f"pipeline and model card in {export(args.run, args.out)}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
