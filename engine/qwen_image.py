"""Qwen-Image as a base model: a transformer on packed pictures and Qwen2.5-VL's tokens; a flow with a shift by size.

The contract that this file fulfils is in engine/base_model.py. Nothing here loads torch before it is called.

    shift      S = e^µ, µ linear in a picture's tokens n: 1.71 at 512, 2.00 at 1024, 2.59 at 1536
    teacher    its multi-step grid is stretched to end at `shift_terminal`, s = 0.02
    guidance   d = x_t - x_0 is rescaled, token by token, to the length of the conditional one
    time       t/1000 in the compute type: the pipeline rounds it so, and training and sampling must agree
"""

import math

from engine import parts
from engine.folders import read_json
from engine.parts import ATTENTION, FEED_FORWARD, FLOW, TEXT_ATTENTION, check_parts, latents_agree, refusal

NAME = "Qwen-Image"
PIPELINE = "QwenImagePipeline"
PART = "transformer"
NETWORK = "QwenImageTransformer2DModel"
VAE = "AutoencoderKLQwenImage"
TEXT = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
TOKENIZERS = {"tokenizer": "Qwen2Tokenizer"}
REWARD = ""  # no latent reward model of its latents is published
SIZES = False
EMPTY = " "
UNGUIDED = "true_cfg_scale=1"
SHIFT_NODE = "ModelSamplingAuraFlow"
MOST_TOKENS = 512  # of a prompt and the end of its template, as the pipeline cuts them
RESOLUTION = 1024  # the pipeline's own
MODULATION = ["img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out"]
LAYERS = [*ATTENTION, *TEXT_ATTENTION, *FEED_FORWARD, *MODULATION]
# of the network: models of other tasks differ
FIXED = {"patch_size": 2, "guidance_embeds": False, "zero_cond_t": False, "use_additional_t_cond": False}
FIXED |= {"use_layer3d_rope": False}

null_is_zero = parts.never
block_name = parts.joint_block_name
map_shape = parts.joint_map_shape
as_map = parts.joint_as_map
pipeline_settings = parts.no_settings
call = parts.plain_call


# --------------------------------------------------------------------------------- configs and schedule


def check(model):
    """Raises UserError for a part that is lacking or of another class, and for a setting that training ignores."""
    check_parts(model, {PART: NETWORK, "vae": VAE, **TEXT})
    scheduler(model)
    channels = read_json(model, "vae/config.json").get("z_dim", 16)
    latents_agree(model, PART, channels, in_channels=4 * channels, out_channels=channels)
    parts.fixed(model, PART, FIXED)


def sides(model):
    """-> pixels of which a picture's sides are multiples, and that none is too long."""
    return 2 * parts.vae_factor(model), None


def scheduler(model):
    """The scheduler's config, with its numbers where it lacks some. Raises UserError for another kind of noise."""
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    config = defaults | {"shift": 1.0, "time_shift_type": "exponential"} | parts.scheduler(model, [FLOW])
    if config.get("invert_sigmas"):
        raise refusal(model, config, "invert_sigmas", "only noise that falls is supported")
    if config["time_shift_type"] not in ("exponential", "linear"):
        raise refusal(model, config, "time_shift_type", "only exponential and linear are supported")
    parts.numbers(model, config, *defaults, "shift")
    return config


def schedule(model, resolution=None):
    """The Schedule for square pictures of this resolution, by default of 1024 pixels."""
    from diffusion import Schedule

    config = scheduler(model)
    shift = shift_at(resolution or RESOLUTION, config)
    return Schedule("flow", shift=shift, terminal=config.get("shift_terminal") or 0.0)


def shift_at(resolution, config):
    """The shift S of a scheduler's config for square pictures."""
    if not config.get("use_dynamic_shifting"):
        return config["shift"]
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    n = (resolution // 16) ** 2  # tokens of a picture
    mu = config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (n - low) / (high - low)
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


def student_scheduler(model, steps, resolution=None):
    """A student's scheduler in diffusers -> its class, and the settings that differ from those of `model`.

    The shift is fixed at the training pictures', and nothing is stretched.
    """
    kind, settings = parts.flow_student(model, steps)
    shift = schedule(model, resolution).shift
    return kind, settings | {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}


def vae(net):
    """Its VAE, of films, for single pictures."""
    from engine.one_frame import OneFrame

    return OneFrame(net)


# ---------------------------------------------------------------------------------------------- prompts


def words(model, **text):
    """-> {folder: class} of what reads prompts, and the settings that conditions depend on: none."""
    return {**TOKENIZERS, **TEXT}, {}


def template():
    """The pipeline's text around a prompt, and how many tokens of its beginning are dropped."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(None, None, None, None, None)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def text(encoder, prompts):
    """tokens (B, L, D), the last state of what follows the template's beginning, and mask (B, L) of B strings."""
    around, first = template()
    how = {"padding": True, "truncation": True, "max_length": first + MOST_TOKENS, "return_tensors": "pt"}
    found = encoder.tokenizers[0]([around.format(prompt) for prompt in prompts], **how).to(encoder.device)
    states = encoder.encoders[0].model.language_model(**found).last_hidden_state  # no pictures: no vision tower
    return parts.masked([row[mask][first:] for row, mask in zip(states, found["attention_mask"].bool())])


def longest(encoder):
    """How many tokens of a prompt and the end of its template are read."""
    return MOST_TOKENS


def lengths(encoder, prompts):
    """How many tokens each of the prompts has with the end of its template."""
    around, first = template()
    texts = [around.format(prompt) for prompt in prompts]
    return [len(ids) - first for ids in encoder.tokenizers[0](texts, verbose=False).input_ids]


# ------------------------------------------------------------------------------------------- the network


def output(net, x_t, t, c):
    """v, as latents. x_t (B, C, h, w) and tokens in the network's dtype."""
    import torch.nn.functional as F

    h, w = (side // 2 for side in x_t.shape[-2:])
    tokens, mask = parts.trimmed(c)
    packed = F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)  # (B, n, 4 C)
    where = {"img_shapes": [[(1, h, w)]] * len(x_t), "timestep": t.to(x_t.dtype) / 1000}
    v = net(packed, tokens, mask, **where, return_dict=False)[0]
    return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (h, w)), 2)


def guidance(x_0, cond, x_t):
    """The guided estimate x_0 with d = x_t - x_0 rescaled to the length of x_t - cond, per token of 4 C numbers."""
    import torch.nn.functional as F

    d = x_t - x_0
    of = lambda d: F.pixel_unshuffle(d, 2).norm(dim=1, keepdim=True)  # noqa: E731  (B, 1, h/2, w/2)
    ratio = of(x_t - cond) / of(d).clamp(min=1e-12)
    return x_t - d * F.interpolate(ratio, scale_factor=2, mode="nearest")


def blocks(net):
    """The parts whose weights FSDP2 gathers together; the table of positions has none."""
    return [net.time_text_embed, net.txt_norm, net.img_in, net.txt_in, *net.transformer_blocks]
