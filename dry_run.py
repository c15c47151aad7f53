"""What a run would need, without weights and without a GPU: python train.py --preset sdxl-4step --dry-run --gpus 8 --gpu-memory 80

The networks are built at their real size on fake tensors (shapes, no numbers) and train.py's own iteration runs through them:
parameters are counted, floating-point operations are counted, and every tensor's storage is followed from birth to death, which
gives the peak of activations and temporaries. Weights and optimizer states follow from the parameter counts:

    trained         16 bytes a parameter: fp32 weight, gradient, two AdamW moments; sharded over all GPUs by FSDP2
    frozen UNets     2 bytes a parameter (bf16), whole on every GPU, as are text encoders; VAE and SAM 4 (fp32)

Geometry: SDXL, its VAE and text encoders, SAM ViT-B. Left out: the CUDA context, fragmentation, NCCL's buffers (an allowance of 8 %).
"""

import dataclasses
import time
import weakref

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from segment_anything import sam_model_registry
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cast import Cast
from diffusion import Schedule, guided, sample_generators
from latent_gan import Head
from latent_reward import LatentRewardModel
from models import VAE, Denoiser, UserError
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
TEXT = {"hidden_act": "gelu", "max_position_embeddings": 77, "vocab_size": 49408}
CLIP_L = CLIPTextConfig(**TEXT, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = CLIPTextConfig(**TEXT, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
ALLOWANCE = 0.08  # of a GPU's memory
IDLE = "distillation, a loop without G (TTUR)"


class Words:
    """The shapes of SDXL's prompt conditions."""

    def encode(self, prompts):
        n = len(prompts)
        return {"tokens": torch.zeros(n, 77, 2048), "pooled": torch.zeros(n, 1280), "size": torch.zeros(n, 6)}


class Unmoved(Cast):
    """A cast whose optimizers do not step: they would look at numbers."""

    def update(self, name, loss, max_norm=None):
        return loss, True

    def weights(self, name):
        return list(self.players[name][0].parameters())


def assemble(config, batch):
    """cast.assemble's cast at SDXL's size and the config's resolution; inside a FakeTensorMode. UNets compute in bf16, as on a GPU."""
    schedule, words, side = Schedule(), Words(), config.resolution // 8
    torch.set_default_dtype(torch.bfloat16)  # weights are born in it: fake ones cannot be cast in place
    teacher, G, fake = (Denoiser(UNet2DConditionModel(**SDXL), schedule, torch.bfloat16) for _ in range(3))
    ref = R = D = head = None
    if config.stage == 2:
        ref = Denoiser(UNet2DConditionModel(**SDXL), schedule, torch.bfloat16)
        ref.net.requires_grad_(False)
        R = LatentRewardModel(UNet2DConditionModel(**SDXL), words, 1280).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    teacher.net.requires_grad_(False)
    vae = VAE(AutoencoderKL(**SDXL_VAE))
    if config.gan_weight and config.gan == "latent":
        head = Head(SDXL["block_out_channels"][-1])
    elif config.gan_weight:
        D = PixelDiscriminator(sam_model_registry["vit_b"]().image_encoder.requires_grad_(False), checkpointing=config.checkpointing)
    if config.checkpointing:
        for net in (G.net, fake.net, vae.net):
            net.enable_gradient_checkpointing()
    nets = {"G": G.net, "fake": fake.net, "D": D, "head": head, "G, RL": G.net if ref else None}
    players = {name: (net, None) for name, net in nets.items() if net is not None}
    for net, _ in players.values():
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # gradients are counted with the states
    latent, S = torch.empty(batch, 4, side, side), schedule.steps(config.student_steps)
    null = words.encode([""])
    return Unmoved(config, 1, latent, words, vae, teacher, guided(teacher, null, config.guidance), null, G, fake, D, head, ref, R, players, S)


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operations make, while they live: `live` now, `peak` so far."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in old | self.known:
                self._born(t.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _born(self, storage):
        size, name = storage.nbytes(), id(storage)
        self.live += size
        self.known.add(name)
        weakref.finalize(storage, self._died, name, size)

    def _died(self, name, size):
        self.live -= size
        self.known.discard(name)


def iterate(config, kind, turn, watcher):
    """One loop of a kind (`turn`: train.py's function for it), on one sample under `watcher`. -> the cast"""
    with FakeTensorMode(allow_non_fake_inputs=True):
        cast = assemble(config, 1)
        draw = lambda purpose: sample_generators(0, 1, [0], purpose)  # noqa: E731
        c, picture = cast.encoder.encode(["a"]), torch.empty(1, 3, config.resolution, config.resolution)
        loop = {"distillation": 0, IDLE: config.rl_ratio + 1 if config.stage == 2 else 1}.get(kind)  # loop 0 updates G
        with watcher:
            if kind == "preference":
                turn(cast, ["a"], c, draw)
            else:
                turn(cast, loop, picture, ["a"], c, draw, watched=False)
    return cast


def measure(config, kind, turn):
    """-> peak bytes of one sample, its floating-point operations (without those that checkpointing repeats), the cast."""
    flops, memory = FlopCounterMode(display=False), Memory()
    iterate(dataclasses.replace(config, checkpointing=False), kind, turn, flops)
    cast = iterate(config, kind, turn, memory)
    return memory.peak, flops.get_total_flops(), cast


def count(module):
    return sum(p.numel() for p in module.parameters())


def states(cast, gpus):
    """Rows of (component, parameters, bytes per GPU with whole weights everywhere, bytes per GPU as train.py shards them)."""
    with FakeTensorMode():
        words = count(CLIPTextModel(CLIP_L)) + count(CLIPTextModelWithProjection(CLIP_G))
    unet = count(cast.teacher.net)
    rows = [("generator G", unet, 16 * unet, 16 * unet / gpus), ("score estimator", unet, 16 * unet, 16 * unet / gpus)]
    rows += [("teacher", unet, 2 * unet, 2 * unet), ("text encoders", words, 2 * words, 2 * words), ("VAE", n := count(cast.vae), 4 * n, 4 * n)]
    if cast.D:
        sam, heads = count(cast.D.encoder[0]), count(cast.D)
        rows += [("SAM", sam, 4 * sam, 4 * sam), ("D's heads", heads, 16 * heads, 16 * heads)]
    if cast.head:
        rows += [("latent discriminator's head", n := count(cast.head), 16 * n, 16 * n)]
    if cast.R:
        judge = count(cast.R) + words
        rows += [("reference", unet, 2 * unet, 2 * unet), ("reward model", judge, 2 * judge, 2 * judge)]
        rows += [("AdamW of the preference updates", 0, 8 * unet, 8 * unet / gpus)]
    blocks = [*cast.G.net.down_blocks, cast.G.net.mid_block, *cast.G.net.up_blocks]
    gathered = 2 * 2 * max(map(count, blocks))  # bf16, this block's and the next one's
    return [*rows, ("FSDP2's gathered blocks", 0, 0, gathered)]


def report(config, distil, prefer):
    """Print what the run needs, and whether it fits; distil, prefer: train.py's. Raises UserError for a preset whose geometry is not SDXL's."""
    if not config.preset.startswith("sdxl"):
        raise UserError(f"--dry-run knows SDXL's geometry, not that of --preset {config.preset}: give one of the sdxl presets")
    if config.fake_lora or config.lora_rank or config.gan == "online":
        raise UserError("--dry-run knows neither LoRAs (--lora-rank, --fake-lora) nor AdvDMD (--gan online) yet")
    began, gpus, share = time.time(), config.gpus, -(-config.batch_size // config.gpus)
    print(f"{config.preset}: stage {config.stage}, {config.resolution} pixels, batch {config.batch_size}, {gpus} GPUs of {config.gpu_memory:g} GB\n")
    kinds = {"distillation": 1} | ({IDLE: config.ttur - 1} if config.ttur > 1 else {})  # how often each kind of loop comes
    if config.stage == 2:
        kinds = {"preference": config.rl_ratio * config.ttur} | ({} if config.rl_only else kinds)
    measured = {kind: measure(config, kind, prefer if kind == "preference" else distil) for kind in kinds}
    cast = next(iter(measured.values()))[-1]
    rows = states(cast, gpus)
    whole, sharded = sum(r[2] for r in rows), sum(r[3] for r in rows)
    print(f"{'':34}{'parameters, M':>14}{'GB, whole':>12}{'GB, sharded':>14}")
    for name, n, a, b in [*rows, ("sum", sum(r[1] for r in rows), whole, sharded)]:
        print(f"{name:34}{n / 1e6:14.1f}{a / 1e9:12.2f}{b / 1e9:14.2f}")

    free, fits, cost = config.gpu_memory * 1e9 * (1 - ALLOWANCE) - sharded, True, 0
    for kind, (peak, flops, _) in measured.items():
        at_once = share if kind == "preference" else config.micro_batch or share
        most = max(0, int(free // peak))
        fits &= at_once <= most
        cost += flops * kinds[kind] / sum(kinds.values())
        print(f"\n{kind}: {peak / 1e9:.2f} GB at the peak and {flops / 1e12:.1f} TFLOP a sample, without what --checkpointing repeats")
        need = (sharded + at_once * peak) / (1 - ALLOWANCE) / 1e9
        print(f"    {at_once} a GPU at once need {need:.0f} GB; {most} fit" + ("" if at_once <= most else remedy(config, kind, share, most)))
    hours = config.iterations * config.batch_size * cost / (config.gpu_tflops * 1e12) / 3600
    print(f"\n{config.iterations} x {config.batch_size} samples at {config.gpu_tflops:g} sustained TFLOP/s: {hours:.0f} GPU-hours")
    print(f"verdict: {'fits' if fits else 'does NOT fit'} on {gpus} x {config.gpu_memory:g} GB ({time.time() - began:.0f} s)")


def remedy(config, kind, share, most):
    """What to change where more is asked for than fits."""
    if not config.checkpointing:
        return ": add --checkpointing"
    if not most:
        return ": more GPUs share the states, a lower --resolution shrinks the rest"
    if kind != "preference":
        return f": add --micro-batch {max(n for n in range(1, most + 1) if share % n == 0)}"
    return f": lower --batch-size to {most * config.gpus}, or use {-(-config.batch_size // most)} GPUs"
