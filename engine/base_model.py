"""What the configs of a base model say, read before its weights are: obeyed, or refused by name. Nothing loads torch.

A setting that changes the model (its noise, its parameterisation, its conditions, its latents) is obeyed or refused.
The sampler that a scheduler's config names (DDIM, Euler, DPM++, Karras noise levels) is no part of the model: the
teacher is drawn by Eq. 2, at the config's `timestep_spacing`; students are drawn at their own steps.
"""

from pathlib import Path

from engine.errors import UserError
from engine.folders import folder, index_of, part_of, read_json, variants

PARTS = {  # of each kind of pipeline: the parts that are used, and their classes
    "unet": {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
    "transformer": {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
}
UNET = {  # inputs that a UNet can want beside x_t, t, the prompt and sizes -> the values without them
    "addition_embed_type": ("text_time",),
    "attention_type": (None, "default"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}
SPACINGS = {  # score-based schedulers -> the timestep_spacing of a config that has none
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"), "leading"),
    **dict.fromkeys(("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"), "linspace"),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"), "linspace"),
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"), "linspace"),
    **dict.fromkeys(("DPMSolverSDEScheduler", "LMSDiscreteScheduler", "SASolverScheduler"), "linspace"),
}
FLOW = "FlowMatchEulerDiscreteScheduler"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def check(model):
    """Raises UserError for a pipeline folder or hub name that lacks a part or has a setting that training ignores."""
    part = part_of(model)
    index = index_of(model)
    for name, kind in PARTS[part].items():
        if (index.get(name) or [None])[-1] is None:
            raise UserError(f"{model} has no {name} (SDXL's refiner has one text encoder): give a whole base model")
        check_part(model, name, kind)
    if Path(folder(model)).is_dir():
        folder(model, "tokenizer", "tokenizer_2")
    scheduler_of(model)
    latents_agree(model, part)
    if part == "unet":
        unet_takes_our_inputs(model)


def check_part(model, name, kind):
    """Raises UserError for a part of another class, or without its config or weights."""
    found = index_of(model)[name][-1]
    if found != kind:
        raise UserError(f"{model}: its {name} is a {found}: only {kind} is supported")
    read_json(model, f"{name}/config.json")
    has_weights(model, name)


def t5_of(model, t5=""):
    """Whether T5 reads the prompts of pipeline folder (or hub name) `model`: "on" or "off".

    t5: --t5 or a run's, by default on where the folder has T5. Raises UserError for "on" where it has none, and for
    a T5 that cannot be used.
    """
    found = (index_of(model).get("text_encoder_3") or [None])[-1]
    if t5 == "off" or not t5 and found is None:
        return "off"
    if found is None:
        raise UserError(f"{model} has no text_encoder_3, and --t5 on wants one: give a --model that has T5")
    try:
        check_part(model, "text_encoder_3", "T5EncoderModel")
        if Path(folder(model)).is_dir():
            folder(model, "tokenizer_3")
    except UserError as e:
        raise e if t5 else UserError(f"{e}, or pass --t5 off") from None
    width = read_json(model, "text_encoder_3/config.json").get("d_model")
    wanted = read_json(model, "transformer/config.json").get("joint_attention_dim")
    if width != wanted:
        raise UserError(f"{model}: transformer has joint_attention_dim {wanted}, its text_encoder_3 is {width} wide")
    return "on"


def has_weights(model, part):
    """Raises UserError for a part of a local folder without weights that PyTorch reads."""
    where = Path(folder(model))
    if where.is_dir() and not variants(path.name for path in (where / part).glob("*")):
        raise UserError(f"{model} is incomplete: {part} has no weights (.safetensors, or .bin of PyTorch)")


def latents_agree(model, part):
    """Raises UserError for a VAE whose latents are not the denoiser's, or that its pipeline does not scale as we do."""
    net = read_json(model, f"{part}/config.json")
    vae = read_json(model, "vae/config.json")
    channels = vae.get("latent_channels", 4)
    for key in ("in_channels", "out_channels"):
        found = net.get(key)
        if found not in (None, channels):
            why = "inpainting and editing models are not supported" if key == "in_channels" else "they must agree"
            raise UserError(f"{model}: its {part} has {key} {found}, its VAE {channels} latent channels: {why}")
    unused = ("shift_factor",) if part == "unet" else ("latents_mean", "latents_std")  # by diffusers' pipeline
    for key in unused:
        if vae.get(key):
            raise UserError(
                f"{model}: vae/config.json has {key} {vae[key]}, which its pipeline does not use: remove it"
            )


def unet_takes_our_inputs(model):
    """Raises UserError for a UNet with other inputs than SDXL's, or of other widths than the text encoders give."""
    net = read_json(model, "unet/config.json")
    for key, allowed in UNET.items():
        if net.get(key) not in allowed:
            raise UserError(f"{model}: unet/config.json has {key} {net.get(key)!r}, which is not supported")
    widths = [read_json(model, f"text_encoder{n}/config.json").get("hidden_size") for n in ("", "_2")]
    pooled = read_json(model, "text_encoder_2/config.json").get("projection_dim")
    cross, sizes = net.get("cross_attention_dim"), net.get("addition_time_embed_dim")
    wanted = net.get("projection_class_embeddings_input_dim")
    if None not in (*widths, cross) and sum(widths) != cross:
        raise UserError(f"{model}: unet has cross_attention_dim {cross}, its text encoders are {sum(widths)} wide")
    if None not in (pooled, sizes, wanted) and pooled + 6 * sizes != wanted:
        raise UserError(
            f"{model}: unet has projection_class_embeddings_input_dim {wanted}, where a pooled prompt and six sizes "
            f"give {pooled + 6 * sizes} (SDXL's refiner is no base model)"
        )


def scheduler_of(model):
    """The scheduler's config, with its prediction_type, steps_offset and timestep_spacing where it has none.

    Raises UserError for a config that lacks a setting, and for a noise process that training does not know.
    """
    config = read_json(model, "scheduler/scheduler_config.json")
    kind = config.get("_class_name")
    kinds = [FLOW] if part_of(model) == "transformer" else sorted(SPACINGS)
    if kind not in kinds:
        raise UserError(
            f"{model}: scheduler/scheduler_config.json is of a {kind}: only {', '.join(kinds)} are supported"
        )
    config = {"prediction_type": "epsilon", "timestep_spacing": SPACINGS.get(kind), "steps_offset": 0} | config
    if config.get("num_train_timesteps", 1000) != 1000:
        raise refusal(model, config, "num_train_timesteps", "only 1000 is supported")
    if kind == FLOW:
        numbers = ["shift"]
        for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
            if config.get(key):
                raise refusal(model, config, key, "only a fixed `shift` is supported")
    else:
        numbers = ["steps_offset"] if config.get("trained_betas") else ["steps_offset", "beta_start", "beta_end"]
        check_score_based(model, config)
    for key in numbers:
        if not isinstance(config.get(key), int | float):
            raise refusal(model, config, key, "it must be a number")
    return config


def check_score_based(model, config):
    """Raises UserError for a score-based scheduler's config with a setting that training does not know."""
    if config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise refusal(model, config, "prediction_type", "only epsilon and v_prediction are supported")
    if config["timestep_spacing"] not in ("leading", "linspace", "trailing"):
        raise refusal(model, config, "timestep_spacing", "only leading, linspace and trailing are supported")
    if config.get("timestep_type", "discrete") != "discrete":
        raise refusal(model, config, "timestep_type", "only discrete is supported")
    if config.get("rescale_betas_zero_snr") and config["prediction_type"] == "epsilon":
        raise refusal(model, config, "rescale_betas_zero_snr", "at t = 999 there is no x_0 in pure noise by epsilon")
    betas = config.get("trained_betas")
    if betas and (len(betas) != 1000 or not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas)):
        raise refusal(model, {"trained_betas": f"of length {len(betas)}"}, "trained_betas", "1000 in (0, 1) are wanted")
    if not betas and config.get("beta_schedule") not in BETA_SCHEDULES:
        raise refusal(model, config, "beta_schedule", f"only {', '.join(BETA_SCHEDULES)} are supported")


def refusal(model, config, key, why):
    """The UserError for a setting of a scheduler's config."""
    return UserError(f"{model}: scheduler/scheduler_config.json has {key} {config.get(key)!r}: {why}")
