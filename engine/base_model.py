"""Base models: which one a pipeline folder is, and its configs, obeyed or refused by name before weights are read.

A setting that changes the model (its noise, its parameterisation, its conditions, its latents) is obeyed or refused.
The sampler that a scheduler's config names (DDIM, Euler, DPM++, Karras noise levels) is no part of the model: the
teacher is drawn by Eq. 2, at the config's `timestep_spacing`; students are drawn at their own steps.

A base model is a file of functions (engine/sdxl.py, sd3.py, qwen_image.py, z_image.py). The losses see none of it:

    PIPELINE, PART, NETWORK, VAE    diffusers' classes, and the denoiser's folder
    TEXT, TOKENIZERS                {folder: class} of what reads prompts; EMPTY: the null prompt
    LAYERS                          what LoRAs adapt, as peft takes it
    check, sides                    what its configs must say, and the sizes of pictures that it draws
    schedule                        the noise schedule (diffusion.Schedule)
    words, text, longest, lengths   prompts -> condition: tokens (B, L, D), and mask (B, L), pooled, size as it needs
    output                          (x_t, t, c) -> the network's own output, (B, C, h, w)
    guidance                        the rule beside classifier-free guidance
    blocks                          what FSDP2 gathers together
    block_name, map_shape, as_map   a block's features, for latent discriminators
    vae                             its VAE with AutoencoderKL's interface
    student_scheduler, call, ...    what an exported student's folder and card say

Nothing here loads torch before it is called; docs/models.md says how to add one.
"""

from importlib.util import find_spec
from pathlib import Path

from engine import qwen_image, sd3, sdxl, z_image
from engine.errors import UserError
from engine.folders import folder, index_of, read_json

NOISE_FILE = "scheduler/scheduler_config.json"
# What a teacher beside --model must have as it is there. Shifts may differ: networks of flows are told s, not t.
CONDITIONS = ("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "cap_feat_dim")
LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
NOISE = ("prediction_type", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
ABSENT = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "latent_channels": 4}  # of older configs
FAMILIES = {family.PIPELINE: family for family in (sdxl, sd3, qwen_image, z_image)}


def family_of(model):
    """The file of functions of the base model in pipeline folder (or hub name) `model`.

    Raises UserError for a pipeline of another kind, for what is no pipeline, and for an index that cannot be read.
    """
    kind = index_of(model).get("_class_name")
    if kind not in FAMILIES:
        raise UserError(f"{model} is a {kind}: only {', '.join(FAMILIES)} are supported")
    return FAMILIES[kind]


def family_of_net(net):
    """The same, of a denoiser's network."""
    names = {cls.__name__ for cls in type(net).__mro__}  # FSDP2 makes a subclass of it
    return next(family for family in FAMILIES.values() if family.NETWORK in names)


def part_of(model):
    """The name of the denoiser in pipeline folder (or hub name) `model`: "unet" or "transformer"."""
    return family_of(model).PART


def check(model):
    """Raises UserError for a pipeline folder or hub name that lacks a part or has a setting that training ignores."""
    family = family_of(model)
    family.check(model)
    if Path(folder(model)).is_dir():
        folder(model, *family.TOKENIZERS)


def check_settings(config, family, factor):
    """Raises UserError for settings that this family's networks cannot have; factor: pixels to a latent number."""
    if config.resolution % (4 * factor):
        raise UserError(f"--resolution {config.resolution} must be a multiple of {4 * factor}")
    if config.gan_crop % factor:
        raise UserError(f"--gan-crop {config.gan_crop} must be a multiple of {factor}")
    if config.size_condition == "original" and not family.SIZES:
        raise UserError(f"--size-condition original: {config.model} has no size conditions, as SDXL has")
    real = config.teacher or config.model
    if "turbo" in Path(real).name.lower():
        raise UserError(f"{real} is distilled, and no teacher: name its base model with --teacher")
    if config.quantize_frozen and not find_spec("torchao"):
        raise UserError("--quantize-frozen int8 needs the package torchao (pip install torchao)")


def check_teacher(teacher, model):
    """check(teacher); and UserError for one that lacks what `model` has: its latents, conditions and noise."""
    check(teacher)
    family = family_of(model)
    if family_of(teacher) is not family:
        raise UserError(f"--teacher {teacher} is a {family_of(teacher).PIPELINE}, --model {model} a {family.PIPELINE}")
    for part, keys in {f"{family.PART}/config.json": CONDITIONS, "vae/config.json": LATENTS, NOISE_FILE: NOISE}.items():
        of_teacher, of_model = read_json(teacher, part), read_json(model, part)
        for key in keys:
            theirs, ours = (of.get(key, ABSENT.get(key)) for of in (of_teacher, of_model))
            if theirs != ours:
                both = f"{theirs} and {ours}"
                raise UserError(f"--teacher {teacher} and --model {model} differ in {key} of {part}: {both}")


def check_size(model, size):
    """Raises UserError where the denoiser and the VAE of pipeline folder `model` cannot draw size = (height, width)."""
    family = family_of(model)
    try:
        step, most = family.sides(model)
    except (KeyError, TypeError) as e:
        raise UserError(f"{model}: a config.json of {family.PART} or vae lacks {e}") from None
    asked = "x".join(map(str, size))
    if any(side % step for side in size):
        near = "x".join(str(max(step, round(side / step) * step)) for side in size)
        raise UserError(f"--size {asked}: {model} draws multiples of {step} pixels, such as {near}")
    if most and max(size) > most:
        raise UserError(f"--size {asked}: {model} has positions for at most {most} pixels a side")
