"""What base models have in common: parts of a pipeline folder, flow schedules, a transformer's blocks.

Used by the files of the base models (engine/sdxl.py, sd3.py, qwen_image.py, z_image.py). Nothing here loads torch.
"""

from pathlib import Path

from engine.errors import UserError
from engine.folders import folder, index_of, read_json, variants

FLOW = "FlowMatchEulerDiscreteScheduler"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # diffusers' names of layers that LoRAs adapt
TEXT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of text tokens beside picture tokens
FEED_FORWARD = ["net.0.proj", "net.2"]


# ------------------------------------------------------------------------------------- a pipeline folder


def vae_factor(model):
    """Pixels to a latent number, along a side. Raises UserError where the VAE's config does not say."""
    vae = read_json(model, "vae/config.json")
    widths = vae.get("block_out_channels") or vae.get("dim_mult")
    if not isinstance(widths, list):
        raise UserError(f"{model}: vae/config.json lacks block_out_channels")
    return 2 ** (len(widths) - 1)


def check_parts(model, classes):
    """Raises UserError for a pipeline that lacks a part of `classes`, {folder: class}, or has it of another class."""
    index = index_of(model)
    for name, kind in classes.items():
        if (index.get(name) or [None])[-1] is None:
            raise UserError(f"{model} has no {name} (SDXL's refiner has one text encoder): give a whole base model")
        check_part(model, name, kind)


def check_part(model, name, kind):
    """Raises UserError for a part of another class, or without its config or weights."""
    found = index_of(model)[name][-1]
    if found != kind:
        raise UserError(f"{model}: its {name} is a {found}: only {kind} is supported")
    read_json(model, f"{name}/config.json")
    has_weights(model, name)


def has_weights(model, part):
    """Raises UserError for a part of a local folder without weights that PyTorch reads."""
    where = Path(folder(model))
    if where.is_dir() and not variants(path.name for path in (where / part).glob("*")):
        raise UserError(f"{model} is incomplete: {part} has no weights (.safetensors, or .bin of PyTorch)")


def latents_agree(model, part, channels, unused=(), **wanted):
    """Raises UserError for a denoiser that wants other latents than the VAE's, and for settings of a VAE, `unused`,
    that the pipeline does not use. channels: the VAE's; wanted: the denoiser's settings, by default channels.
    """
    net = read_json(model, f"{part}/config.json")
    vae = read_json(model, "vae/config.json")
    for key, number in (wanted or {"in_channels": channels, "out_channels": channels}).items():
        found = net.get(key)
        if found not in (None, number):
            why = "inpainting and editing models are not supported" if key == "in_channels" else "they must agree"
            raise UserError(f"{model}: its {part} has {key} {found}, its VAE {channels} latent channels: {why}")
    for key in unused:
        if vae.get(key):
            raise UserError(
                f"{model}: vae/config.json has {key} {vae[key]}, which its pipeline does not use: remove it"
            )


def fixed(model, part, values):
    """Raises UserError for a network with other settings than `values`; those that its config lacks are right."""
    net = read_json(model, f"{part}/config.json")
    for key, value in values.items():
        if net.get(key, value) != value:
            raise UserError(f"{model}: {part}/config.json has {key} {net[key]!r}, only {value!r} is supported")


def refusal(model, config, key, why):
    """The UserError for a setting of a scheduler's config."""
    return UserError(f"{model}: scheduler/scheduler_config.json has {key} {config.get(key)!r}: {why}")


def scheduler(model, kinds):
    """The scheduler's config. Raises UserError for one of another class, or of another number of timesteps."""
    config = read_json(model, "scheduler/scheduler_config.json")
    kind = config.get("_class_name")
    if kind not in kinds:
        raise UserError(
            f"{model}: scheduler/scheduler_config.json is of a {kind}: only {', '.join(kinds)} are supported"
        )
    if config.get("num_train_timesteps", 1000) != 1000:
        raise refusal(model, config, "num_train_timesteps", "only 1000 is supported")
    return config


# ---------------------------------------------------------------------------------------- flow schedules


def flow_scheduler(model):
    """The config of a flow scheduler with one shift. Raises UserError for another."""
    config = scheduler(model, [FLOW])
    for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
        if config.get(key):
            raise refusal(model, config, key, "only a fixed `shift` is supported")
    numbers(model, config, "shift")
    return config


def numbers(model, config, *keys):
    """Raises UserError for settings of a scheduler's config that are no numbers."""
    for key in keys:
        if not isinstance(config.get(key), int | float):
            raise refusal(model, config, key, "it must be a number")


def flow_schedule(model, resolution=None):
    """The Schedule of a flow scheduler with one shift."""
    from diffusion import Schedule

    return Schedule("flow", shift=flow_scheduler(model)["shift"])


def flow_student(model, steps, resolution=None):
    """A flow student's scheduler in diffusers -> its class, and the settings that differ from those of `model`.

    Stochastic sampling re-noises as diffusion.backward_simulation does. Other samplers' noise levels are left out.
    """
    plain = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
    return FLOW, {"stochastic_sampling": True} | plain


def plain_call(steps, encoder):
    """The arguments of a student's call in diffusers beside prompt, guidance and size, and a line on its text."""
    return f"num_inference_steps={steps}", ""


def no_settings(model):
    """Settings of the exported pipeline beside its parts."""
    return {}


# ------------------------------------------------------------------------- conditions of unequal length


def masked(rows):
    """Tokens of B prompts, (N, D) each -> tokens (B, L, D), padded by zeros, and mask (B, L), False there."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    rows = [row.float() for row in rows]
    mask = pad([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows], batch_first=True)
    return {"tokens": pad(rows, batch_first=True), "mask": mask}


def real_tokens(c):
    """A condition -> the tokens of each prompt, (N, D), without padding."""
    if "mask" not in c:
        return list(c["tokens"])
    return [row[:n] for row, n in zip(c["tokens"], c["mask"].sum(1).tolist())]


def trimmed(c):
    """A condition -> tokens (B, L, D) and mask (B, L), no longer than the batch needs; mask None without padding."""
    tokens, mask = c["tokens"], c.get("mask")
    if mask is None:
        return tokens, None
    lengths = mask.sum(1).tolist()
    most = max(lengths)
    return tokens[:, :most], None if min(lengths) == most else mask[:, :most]


def never(model):
    """The null prompt's condition is encoded, not zeros."""
    return False


# --------------------------------------------------------------------- the VAE and a transformer's blocks


def same(net):
    """A VAE with AutoencoderKL's interface -> itself."""
    return net


def linear_guidance(x_0, cond, x_t):
    """The guided estimate as classifier-free guidance gives it."""
    return x_0


def block_of(name, n, where):
    """The middle or the last of a transformer's n blocks, which it calls `name`.

    ASSUMPTION: in a transformer of n blocks the (n + 1)//2-th stands for a UNet's mid block, which DMD2's D reads.
    """
    return f"{name}.{n - 1 if where == 'last' else (n - 1) // 2}"


def square_of_tokens(tokens, size):
    """Picture tokens (B, n, D), row by row, of latents of this size (h, w), patches of 2 -> (B, D, h/2, w/2)."""
    return tokens.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2))


# of SD3's and Qwen-Image's joint blocks, which give (text tokens, picture tokens)


def joint_block_name(net, where):
    """The middle or the last block."""
    return block_of("transformer_blocks", len(net.transformer_blocks), where)


def joint_map_shape(net, side, where):
    """The width and the side of that block's map, where latents have this side."""
    return net.inner_dim, side // 2


def joint_as_map(net, output, size):
    """A block's output, text tokens and picture tokens -> a map (B, D, h/2, w/2)."""
    return square_of_tokens(output[1], size)
