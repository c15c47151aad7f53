"""SDXL or SD3-Medium at real size without weights: the geometry of its networks, VAE and text encoders, and train.py's cast on fake tensors.

Fake tensors have shapes and types and no numbers: dry_run.py follows train.py's own iteration through them.
"""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from segment_anything import sam_model_registry
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextConfig

from cast import Cast
from diffusion import Schedule, guided
from latent_gan import Head
from latent_reward import LatentRewardModel
from models import VAE, Denoiser, add_lora
from pixel_gan import PixelDiscriminator

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
SD3_VAE = SDXL_VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
TEXT = {"hidden_act": "gelu", "max_position_embeddings": 77, "vocab_size": 49408}
CLIP_L = CLIPTextConfig(**TEXT, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = CLIPTextConfig(**TEXT, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)


class Words:
    """The shapes of a model's prompt conditions: SDXL's, or SD3's (with as many zeros for T5's tokens as CLIP has)."""

    def __init__(self, sd3):
        self.sd3 = sd3

    def encode(self, prompts):
        n = len(prompts)
        if self.sd3:
            return {"tokens": torch.zeros(n, 154, 4096), "pooled": torch.zeros(n, 2048)}
        return {"tokens": torch.zeros(n, 77, 2048), "pooled": torch.zeros(n, 1280), "size": torch.zeros(n, 6)}


class Unmoved(Cast):
    """A cast whose optimizers do not step, for they would look at numbers: where they would, a turn ends."""

    def update(self, name, loss, max_norm=None):
        self.meter.turn(name)
        return loss, True

    def weights(self, name):
        return list(self.players[name][0].parameters())


def with_loras(build, rank):
    """A network with train.py's two LoRAs, on fake tensors. peft casts its weights in place, which fake ones refuse: first without storage."""
    with unset_fake_temporarily(), torch.device("meta"):
        net = build()
        add_lora(net, rank, "student", "fake", dtype=torch.bfloat16)
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype))
    return net


def assemble(config, batch):
    """cast.assemble's cast at real size and the config's resolution; inside a FakeTensorMode. Denoisers compute in bf16, as on a GPU."""
    sd3 = config.preset.startswith("sd3")
    schedule, words, side = Schedule("flow", shift=3.0) if sd3 else Schedule(), Words(sd3), config.resolution // 8
    build = lambda: SD3Transformer2DModel(**SD3) if sd3 else UNet2DConditionModel(**SDXL)  # noqa: E731
    torch.set_default_dtype(torch.bfloat16)  # weights are born in it: fake ones cannot be cast in place
    if config.lora_rank:
        net = with_loras(build, config.lora_rank)
        scales = ({"student": a, "fake": b} for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
        teacher, G, fake = (Denoiser(net, schedule, torch.bfloat16, s) for s in scales)
    else:
        teacher, G, fake = (Denoiser(build(), schedule, torch.bfloat16) for _ in range(3))
        teacher.net.requires_grad_(False)
    ref = R = D = head = None
    if config.stage == 2:
        ref = Denoiser(UNet2DConditionModel(**SDXL), schedule, torch.bfloat16)
        ref.net.requires_grad_(False)
        R = LatentRewardModel(UNet2DConditionModel(**SDXL), words, 1280).eval().requires_grad_(False)
    sam = sam_model_registry["vit_b"]().image_encoder.requires_grad_(False) if config.gan == "pixel" and config.gan_weight else None
    torch.set_default_dtype(torch.float32)
    vae = VAE(AutoencoderKL(**(SD3_VAE if sd3 else SDXL_VAE)))
    if config.gan_weight and config.gan == "latent":
        head = Head(SDXL["block_out_channels"][-1])
    elif sam:
        D = PixelDiscriminator(sam, checkpointing=config.checkpointing)
    if config.checkpointing:
        for net in (G.net, fake.net, vae.net):
            net.enable_gradient_checkpointing()
    nets = {"G": G.net, "fake": fake.net, "D": D, "head": head, "G, RL": G.net if ref else None}
    players = {name: (net, None) for name, net in nets.items() if net is not None}
    for net in {id(net): net for net, _ in players.values()}.values():
        for p in filter(lambda p: p.requires_grad, net.parameters()):
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # gradients are counted with the states
    latent, S = torch.empty(batch, vae.channels, side, side), schedule.steps(config.student_steps)
    null = words.encode([""])
    at_scale, judge = guided(teacher, null, config.guidance), (fake, head)
    return Unmoved(config, 1, latent, words, vae, teacher, at_scale, null, G, fake, D, head, judge, ref, R, players, S)
