"""The base models at real size without weights: the geometry of their networks, and a run's networks.

The networks are of fake tensors, which have shapes and dtypes but no numbers: engine/dry_run.py runs train.py's own
iteration on them.
"""

from functools import partial

import diffusers
import torch
from segment_anything import sam_model_registry
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffusion import Schedule, guided
from engine import qwen_image, sd3, sdxl, z_image
from engine.models import VAE, Denoiser, add_lora
from engine.networks import LORAS, Networks
from latent_reward import LatentRewardModel

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35 = SD3 | {"qk_norm": "rms_norm"}
SD35_MEDIUM = SD35 | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
SD35_LARGE = SD35 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
QWEN = {"num_layers": 60}  # the rest are the class's own values
Z_IMAGE = {"n_layers": 30, "axes_lens": [1536, 512, 512]}
SD3_VAE = SDXL_VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
Z_IMAGE_VAE = SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
BASES = {  # by the beginning of their presets' names: the base model, its network's geometry, and its VAE's
    "sdxl": (sdxl, SDXL, SDXL_VAE),
    "sd3": (sd3, SD3, SD3_VAE),
    "sd35-medium": (sd3, SD35_MEDIUM, SD3_VAE),
    "sd35-large": (sd3, SD35_LARGE, SD3_VAE),
    "qwen": (qwen_image, QWEN, {}),
    "zimage": (z_image, Z_IMAGE, Z_IMAGE_VAE),
}
DEPTHS = {"qwen": "num_layers", "zimage": "n_layers"}  # of networks whose many blocks are all alike
PROMPT = 256  # tokens of a prompt, where base models read as many as it has


def clip_text(width, layers, heads):
    """The geometry of a CLIP text encoder as SDXL and SD3 have it."""
    return CLIPTextConfig(
        hidden_act="gelu",
        max_position_embeddings=77,
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )


CLIP_L = clip_text(768, 12, 12)
CLIP_G = clip_text(1280, 32, 20)


def base_of(preset):
    """The base model that a preset is for, one of BASES; None for one of another geometry."""
    return next((name for name in BASES if preset.startswith(f"{name}-")), None)


def denoiser_of(base, depth=None):
    """The network of one of BASES, of its geometry. depth: of one in DEPTHS, another number of blocks."""
    family, geometry, _ = BASES[base]
    return getattr(diffusers, family.NETWORK)(**geometry | ({DEPTHS[base]: depth} if depth else {}))


def schedule_of(base, resolution):
    """The noise schedule of one of BASES, as its published scheduler has it."""
    if base == "sdxl":
        return Schedule()
    if base == "qwen":
        return Schedule("flow", shift=qwen_image.shift_at(resolution, QWEN_SCHEDULER), terminal=0.02)
    return Schedule("flow", shift=6.0 if base == "zimage" else 3.0)


QWEN_SCHEDULER = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
QWEN_SCHEDULER |= {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
T5_XXL = T5Config(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)


QWEN3 = {  # 4 B
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN2_5 = {  # 7 B
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
QWEN2_5_EYES = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


def has_t5(config):
    """Whether T5 is among the text encoders: SD3's pipeline has it."""
    base = base_of(config.preset)
    return base in BASES and BASES[base][0] is sd3 and config.t5 != "off"


def text_encoders(config):
    """The text encoders of a run, without numbers."""
    base = base_of(config.preset)
    with unset_fake_temporarily(), torch.device("meta"):
        if base == "qwen":
            both = Qwen2_5_VLConfig(text_config=QWEN2_5, vision_config=QWEN2_5_EYES)
            return [Qwen2_5_VLForConditionalGeneration(both)]
        if base == "zimage":
            return [Qwen3Model(Qwen3Config(**QWEN3))]
        t5 = [T5EncoderModel(T5_XXL)] if has_t5(config) else []
        return [CLIPTextModel(CLIP_L), CLIPTextModelWithProjection(CLIP_G), *t5]


class Words:
    """The prompt encoder's shapes: SD3's without T5 has as many zero tokens as CLIP has tokens."""

    def __init__(self, config):
        self.base = base_of(config.preset)
        self.more = config.text_length if has_t5(config) else 77

    def encode(self, prompts):
        n = len(prompts)
        if self.base in ("qwen", "zimage"):
            return {"tokens": torch.zeros(n, PROMPT, 3584 if self.base == "qwen" else 2560)}
        if self.base == "sdxl":
            return {"tokens": torch.zeros(n, 77, 2048), "pooled": torch.zeros(n, 1280), "size": torch.zeros(n, 6)}
        return {"tokens": torch.zeros(n, 77 + self.more, 4096), "pooled": torch.zeros(n, 2048)}


class Unmoved(Networks):
    """Networks whose optimizers do not step, because fake tensors have no numbers: a turn of the meter ends instead."""

    meter = None  # engine/dry_run.py's

    def step(self, name, loss, max_norm=None):
        self.meter.turn(name)
        return loss, True

    def weights(self, name):
        return list(self.players[name][0].parameters())

    def add(self, name, module, rate):
        self.trained[name] = (module, rate, "")
        return module

    def sam(self):
        torch.set_default_dtype(torch.bfloat16)
        encoder = sam_model_registry["vit_b"]().image_encoder.requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        return encoder


def with_loras(build, rank):
    """A network with the two LoRAs of --lora-rank, of fake tensors.

    peft casts weights in place, which fake tensors refuse: the network is first made on the meta device.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        net = build()
        add_lora(net, rank, "student", "fake", dtype=torch.bfloat16)
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype))
    rope = getattr(net, "pos_embed", None)
    if hasattr(rope, "pos_freqs"):  # Qwen-Image's tables of positions are neither: they are made again
        net.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
    return net


def assemble(config, batch, prepare, kind=Unmoved, depth=None):
    """What engine.networks.assemble gives, at real size and the config's resolution; inside a FakeTensorMode.

    Denoisers compute in bf16, as on a GPU. prepare(nets): what the method adds; kind: the class to make; depth: another
    number of blocks, for denoiser_of.
    """
    base = base_of(config.preset)
    family, _, vae_geometry = BASES[base]
    schedule = schedule_of(base, config.resolution)
    words = Words(config)
    side = config.resolution // 8
    build = partial(denoiser_of, base, depth)
    torch.set_default_dtype(torch.bfloat16)  # for the weights: fake ones cannot be cast in place
    if config.lora_rank:
        net = with_loras(build, config.lora_rank)
        teacher, G, fake = (Denoiser(net, schedule, torch.bfloat16, scales) for scales in LORAS.values())
        if config.teacher:
            teacher = Denoiser(build(), schedule, torch.bfloat16)
            teacher.net.requires_grad_(False)
    else:
        teacher, G, fake = (Denoiser(build(), schedule, torch.bfloat16) for _ in range(3))
        teacher.net.requires_grad_(False)
    ref = R = None
    if config.stage == 2:
        ref = Denoiser(build(), schedule, torch.bfloat16)
        ref.net.requires_grad_(False)
        R = LatentRewardModel(build(), words, 1280).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    vae = VAE(family.vae(getattr(diffusers, family.VAE)(**vae_geometry)))
    if config.checkpointing:
        for net in (G.net, fake.net, vae.net):
            net.enable_gradient_checkpointing()
    latent = torch.empty(batch, vae.channels, side, side)
    null = words.encode([""])
    at_scale = guided(teacher, null, config.guidance)
    S = schedule.steps(config.student_steps)
    nets = kind(config, 1, latent, words, vae, teacher, at_scale, null, G, fake, S, ref=ref, R=R)
    nets.trained["G"] = (G.net, config.lr, "student" if config.lora_rank else "")
    nets.trained["fake"] = (fake.net, config.fake_lr, "fake" if config.lora_rank else "")
    prepare(nets)
    nets.players = {name: (module, None) for name, (module, *_) in nets.trained.items()}
    if config.stage == 2:
        nets.players["G, RL"] = (G.net, None)
    return nets


def drop_gradients(nets):
    """In place: gradients are dropped as soon as they are computed, because the table of states counts them."""
    for net in {id(net): net for net, _ in nets.players.values()}.values():
        for p in net.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
