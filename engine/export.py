"""Export a student as a diffusers pipeline folder with a model card; a LoRA student also as its LoRA alone.

The folder's scheduler draws the student's steps: LCMScheduler with original_inference_steps = K for SDXL,
FlowMatchEulerDiscreteScheduler with stochastic_sampling for the flow models. diffusers' configs hold no number of
steps (SD3: sigmas) and no guidance scale; these are on the card.

LoRAs of SDXL are written twice, because no one naming of layers is read by all: by diffusers' names in kohya's
spelling, and by those of the original SDXL, which kohya's sd-scripts has. LoRAs of transformers have
diffusers' own keys.
"""

import json
import re
from math import inf
from pathlib import Path

import diffusers
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from transformers import CLIPPreTrainedModel

from engine.base_model import family_of
from engine.errors import UserError
from engine.folders import check_new, folder, on_disk
from engine.models import LORA, load_denoiser, load_part, waiting
from engine.prompts import load_encoder
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
image = pipe("a prompt", {call}, {unguided}, height={resolution}, width={resolution}).images[0]
```

- Steps: {steps}, at timesteps {timesteps}; the scheduler in this folder gives them for `{call}`.
{text}- Guidance: none, `{unguided}`. The teacher's guidance ({guidance:g}) is distilled into the weights.
{teacher}- ComfyUI (untested): sampler "lcm", scheduler "simple", {steps} steps, cfg 1{shift}.
{files}
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

pipe = DiffusionPipeline.from_pretrained("{model}", torch_dtype=torch.float32{variant}{without})
pipe.load_lora_weights("THIS_FOLDER", weight_name="{weights}")
pipe.scheduler = {scheduler}.from_pretrained("THIS_FOLDER", subfolder="scheduler")"""


SD_SCRIPTS = "lora_for_sd_scripts.safetensors"
FILES = {  # the card's lines on a LoRA's files, by the kind of denoiser
    "unet": f"""- `{LORA}`: the LoRA for diffusers, ComfyUI and the WebUI (diffusers' names in kohya's spelling).
- `{SD_SCRIPTS}`: the same LoRA for kohya's sd-scripts (layers by the original SDXL's names).
""",
    "transformer": f"""- `{LORA}`: the LoRA for diffusers and ComfyUI. kohya's sd-scripts does not read it.
""",
}


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
    model = folder(config["model"])
    family = family_of(model)
    side = config["resolution"]
    student = load_denoiser(model, student=made, resolution=side)  # raises UserError for a torn LoRA
    scheduler = student_scheduler(model, config["student_steps"], side)
    text = {"t5": config["t5"], "text_length": config.get("text_length", 256)}
    encoder = load_encoder(model, side, loaded=False, **text)
    words = encoder.made("tokenizer" if lora else "")
    encoder.tokenizers = [part for name, part in words.items() if name.startswith("tokenizer")]
    if lora:
        scheduler.save_pretrained(out / "scheduler")
        save_lora(load_file(made / "lora" / LORA), student.net, out)
    else:
        pipeline = pipeline_of(model, student.net, scheduler, words)
        with waiting(f"writing {out}", size=inf):
            pipeline.save_pretrained(out)
    names = {"model": config["model"], "scheduler": type(scheduler).__name__, "weights": LORA, "variant": ""}
    nets = (family.PART, "vae", *(name for name in encoder.parts if name.startswith("text")))
    variants = {on_disk(model, name)[1] for name in nets} - {None}
    if variants:
        names["variant"] = f', variant="{min(variants)}"'
    lacking = [name for name, v in family.pipeline_settings(model).items() if v is None and name not in encoder.parts]
    names["without"] = "".join(f", {name}=None" for name in lacking)
    load = (LOAD_LORA if lora else LOAD).format(**names)
    files = FILES[family.PART] if lora else ""
    (out / "README.md").write_text(card(run, made, config, load, files, student.schedule, encoder))
    return out


def student_scheduler(model, steps, resolution=None):
    """diffusers' scheduler for a student of pipeline folder `model`: its steps, re-noised as by backward_simulation.

    What a config says of other samplers (clipped estimates, other noise levels) is left out.
    """
    kind, settings = family_of(model).student_scheduler(model, steps, resolution)
    return load_part(getattr(diffusers, kind), model, "scheduler", **settings)


def pipeline_of(model, net, scheduler, words):
    """A diffusers pipeline of a student's network, in fp32, and the other parts of pipeline folder `model`.

    words: tokenizers and text encoders. CLIPs are written in fp32, larger ones as they are stored.
    """
    family = family_of(model)
    for part in words.values():
        if isinstance(part, CLIPPreTrainedModel):
            part.float()
    vae = load_part(getattr(diffusers, family.VAE), folder(model, "vae"), "vae", low_cpu_mem_usage=False).float()
    parts = {"vae": vae, "scheduler": scheduler, family.PART: net} | words
    return getattr(diffusers, family.PIPELINE)(**{**family.pipeline_settings(model), **parts})


def save_lora(weights, net, out):
    """Write a LoRA of network `net`, {its key for diffusers: tensor}, into folder `out`: the files of FILES."""
    if next(iter(weights)).startswith("unet."):
        weights = convert_state_dict_to_kohya(weights)  # with one alpha per layer: its rank, as in training
        weights = {key: v.float() if key.endswith(".alpha") else v for key, v in weights.items()}
        layers = net.config.layers_per_block
        save_file({original_name(key, layers): v for key, v in weights.items()}, out / SD_SCRIPTS, {"format": "pt"})
    save_file(weights, out / LORA, metadata={"format": "pt"})


def original_name(key, layers):
    """A LoRA's key by diffusers' name of a UNet layer -> by the original SDXL's. layers: residual blocks per level.

    lora_unet_down_blocks_1_attentions_0_proj_in.alpha -> lora_unet_input_blocks_4_1_proj_in.alpha, for two layers.
    """
    place = re.match(r"lora_unet_(down|mid|up)_blocks?_(?:(\d+)_)?(resnets|attentions)_(\d+)_(.*)", key)
    where, level, kind, i, rest = place.groups()
    attention = kind == "attentions"
    if where == "mid":  # residual block, attention, residual block
        block = f"middle_block_{1 if attention else 2 * int(i)}"
    elif where == "down":  # the stem comes first, each level ends in its downsampler
        block = f"input_blocks_{1 + int(level) * (layers + 1) + int(i)}_{int(attention)}"
    else:
        block = f"output_blocks_{int(level) * (layers + 1) + int(i)}_{int(attention)}"
    if not attention:
        layer, end = rest.split(".", 1)
        rest = {"conv1": "in_layers_2", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}[layer] + "." + end
    return f"lora_unet_{block}_{rest}"


def card(run, made, config, load, files, schedule, encoder):
    """The model card of checkpoint folder `made`. load: the code that makes `pipe`; files: its lines on other files.

    encoder: its tokenizers are loaded.
    """
    steps = config["student_steps"]
    family = encoder.family
    call, text = family.call(steps, encoder)
    shift = f"; node {family.SHIFT_NODE} with shift {schedule.shift:g}" if family.SHIFT_NODE else ""
    measured = run / "metrics.json"
    metrics = f"Not measured (evaluate.py --json {measured})."
    if measured.is_file():
        metrics = f"```json\n{measured.read_text().strip()}\n```"
    return CARD.format(
        **{k: config[k] for k in ("model", "stage", "batch_size", "resolution", "guidance")},
        steps=steps,
        teacher=f"- The teacher: {config['teacher']}.\n" if config.get("teacher") else "",
        load=load,
        files=files,
        call=call,
        unguided=family.UNGUIDED,
        shift=shift,
        text=text,
        loops=json.loads((made / "progress.json").read_text())["loops"],
        timesteps=", ".join(f"{t:g}" for t in schedule.steps(steps).tolist()),
        metrics=metrics,
        settings=json.dumps(config, indent=2),
    )
