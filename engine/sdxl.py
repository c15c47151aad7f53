"""SDXL as a base model: a UNet, two CLIPs, sizes as conditions; ε- or v-prediction on any schedule of β.

The contract that this file fulfils is in engine/base_model.py. Nothing here loads torch before it is called.
"""

from engine.errors import UserError
from engine.folders import index_of, read_json
from engine.parts import (
    ATTENTION,
    FEED_FORWARD,
    check_parts,
    latents_agree,
    linear_guidance,
    numbers,
    refusal,
    same,
    vae_factor,
)
from engine.parts import scheduler as scheduler_config

NAME = "SDXL"
PIPELINE = "StableDiffusionXLPipeline"
PART = "unet"
NETWORK = "UNet2DConditionModel"
VAE = "AutoencoderKL"
TEXT = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
REWARD = "unet"  # the layout of reward models of these latents (engine/reward_layout.py)
SIZES = True  # a condition has the picture's sizes
EMPTY = ""  # the null prompt
UNGUIDED = "guidance_scale=0"
SHIFT_NODE = ""
LAYERS = [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"]

INPUTS = {  # inputs that a UNet can want beside x_t, t, the prompt and sizes -> the values without them
    "addition_embed_type": ("text_time",),
    "attention_type": (None, "default"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}
SPACINGS = {  # schedulers -> the timestep_spacing of a config that has none
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"), "leading"),
    **dict.fromkeys(("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"), "linspace"),
    **dict.fromkeys(("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"), "linspace"),
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"), "linspace"),
    **dict.fromkeys(("DPMSolverSDEScheduler", "LMSDiscreteScheduler", "SASolverScheduler"), "linspace"),
}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

guidance = linear_guidance
vae = same


# ------------------------------------------------------------------------------------------- its configs


def check(model):
    """Raises UserError for a part that is lacking or of another class, and for a setting that training ignores."""
    check_parts(model, {PART: NETWORK, "vae": VAE, **TEXT})
    scheduler(model)
    channels = read_json(model, "vae/config.json").get("latent_channels", 4)
    latents_agree(model, PART, channels, unused=["shift_factor"])
    takes_our_inputs(model)


def takes_our_inputs(model):
    """Raises UserError for a UNet with other inputs than SDXL's, or of other widths than the text encoders give."""
    net = read_json(model, "unet/config.json")
    for key, allowed in INPUTS.items():
        if net.get(key) not in allowed:
            raise UserError(f"{model}: unet/config.json has {key} {net.get(key)!r}, which is not supported")
    widths = [read_json(model, f"{name}/config.json").get("hidden_size") for name in TEXT]
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


def scheduler(model):
    """The scheduler's config, with its prediction_type, steps_offset and timestep_spacing where it has none.

    Raises UserError for a config that lacks a setting, and for one with a setting that training does not know.
    """
    config = scheduler_config(model, sorted(SPACINGS))
    spacing = SPACINGS[config["_class_name"]]
    config = {"prediction_type": "epsilon", "timestep_spacing": spacing, "steps_offset": 0} | config
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
    numbers(model, config, "steps_offset", *(() if betas else ("beta_start", "beta_end")))
    return config


def sides(model):
    """-> pixels of which a picture's sides are multiples, and the most that a side may have or None."""
    levels = len(read_json(model, "unet/config.json")["block_out_channels"])  # its down blocks halve the latents
    return vae_factor(model) * 2 ** (levels - 1), None


# ------------------------------------------------------------------------------------ schedule and export


def schedule(model, resolution=None):
    """The Schedule of a pipeline folder's (or hub name's) scheduler config."""
    from diffusers import DDIMScheduler

    from diffusion import Schedule

    config = scheduler(model)
    kind = {"epsilon": "eps", "v_prediction": "v"}[config["prediction_type"]]
    spacing = {"spacing": config["timestep_spacing"], "offset": config["steps_offset"]}
    special = config.get("trained_betas") or config.get("rescale_betas_zero_snr")
    if config.get("beta_schedule") == "scaled_linear" and not special:
        return Schedule(kind, config["beta_start"], config["beta_end"], **spacing)
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas = DDIMScheduler(**{name: config[name] for name in names if name in config}).betas
    return Schedule(kind, betas=tuple(betas.tolist()), **spacing)


def student_scheduler(model, steps, resolution=None):
    """A student's scheduler in diffusers -> its class, and the settings that differ from those of `model`."""
    return "LCMScheduler", {"original_inference_steps": steps, "clip_sample": False, "thresholding": False}


def pipeline_settings(model):
    """Settings of the exported pipeline beside its parts."""
    return {"force_zeros_for_empty_prompt": null_is_zero(model)}


def call(steps, encoder):
    """The arguments of a student's call in diffusers beside prompt, guidance and size, and a line on its text."""
    return f"num_inference_steps={steps}", ""


# ---------------------------------------------------------------------------------------------- prompts


def words(model, **text):
    """-> {folder: class} of what reads prompts, and the settings that conditions depend on: none."""
    return {**TOKENIZERS, **TEXT}, {}


def text(encoder, prompts):
    """tokens (B, L, d1 + d2) and pooled (B, p), the second encoder's, of B strings."""
    return encoder.clip(prompts)


def longest(encoder):
    """How many tokens of a prompt are read."""
    return encoder.tokenizers[0].model_max_length


def lengths(encoder, prompts):
    """How many tokens each of the prompts has."""
    return [len(ids) for ids in encoder.tokenizers[0](list(prompts), verbose=False).input_ids]


def null_is_zero(model):
    """Whether the null prompt's tokens and pooled are zeros, as the pipeline's index says, and not encoded."""
    return index_of(model).get("force_zeros_for_empty_prompt", True)


# ------------------------------------------------------------------------------------------- the network


def output(net, x_t, t, c):
    """The network's own output. x_t (B, C, h, w), tokens and pooled in its dtype; bf16 would round sizes."""
    added = {"text_embeds": c["pooled"], "time_ids": c["size"]}
    return net(x_t, t, c["tokens"], added_cond_kwargs=added, return_dict=False)[0]


def blocks(net):
    """The parts whose weights FSDP2 gathers together, of a whole UNet or of a reward model's, without up blocks."""
    # The stem too: where only the mid block's features have a gradient (siblings/dmd2.py), FSDP2 does not gather the
    # root's weights.
    return [net.conv_in, net.time_embedding, net.add_embedding, *net.down_blocks, net.mid_block, *(net.up_blocks or ())]


def block_name(net, where):
    """The mid block, or the last up block."""
    return f"up_blocks.{len(net.up_blocks) - 1}" if where == "last" else "mid_block"


def map_shape(net, side, where):
    """The width and the side of that block's map, where latents have this side."""
    widths = net.config.block_out_channels
    return (widths[0], side) if where == "last" else (widths[-1], side >> (len(widths) - 1))


def as_map(net, output, size):
    """A block's output -> a map (B, D, h', w'). A down block gives its skip connections beside it."""
    return output[0] if isinstance(output, tuple) else output
