"""What a run would need, without weights and without a GPU: python train.py --preset sdxl-4step --dry-run --gpus 8 --gpu-memory 80

The networks are built at their real size on fake tensors (shapes, no numbers) and train.py's own iteration runs through them:
parameters are counted, floating-point operations are counted (with those that --checkpointing repeats), and every tensor's storage is
followed from birth to death, which gives the peak of activations and temporaries. Weights and optimizer states follow from the parameter counts:

    trained         16 bytes a parameter: fp32 weight, gradient, two AdamW moments (10 with --optimizer adamw8bit); sharded by FSDP2
    frozen           2 bytes a parameter (bf16), sharded likewise: teacher (under LoRAs the one network), reference, the reward model's UNet
    on every GPU     text encoders and SAM (bf16), VAE (fp32), the discriminators' heads

Geometry: SDXL or SD3-Medium with its VAE and two CLIP text encoders, SAM ViT-B. Left out: the CUDA context, fragmentation, NCCL's
buffers (an allowance of 8 %); the buffers in which FSDP2 reduces a block's gradients (bf16 and fp32, 7 GB for the largest of SDXL's), which
come when VAE and SAM have let go of theirs, and previews, which draw 4 pictures of 1024 together.
"""

import time
import weakref

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from segment_anything import sam_model_registry
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cast import Cast
from diffusion import Schedule, guided, sample_generators
from latent_gan import Head
from latent_reward import LatentRewardModel
from models import VAE, Denoiser, UserError, add_lora, blocks
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
ALLOWANCE = 0.08  # of a GPU's memory
MOMENTS = {"adamw": 8, "adamw8bit": 2 * (1 + 4 / 256)}  # bytes a parameter; torchao keeps an fp32 scale per 256 numbers
IDLE = "a loop without G (TTUR)"
TURNS = {"G": "generator", "fake": "score estimator", "D": "discriminator", "G, RL": "generator"}


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


class Meter(TorchDispatchMode):
    """What operations make and cost: bytes of all their tensors while these live (`live` now, `peak` so far), and floating-point operations."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.flops, self.known, self.turns = 0, 0, 0, set(), {}

    def turn(self, name):
        """A turn ends: its peak and its operations are kept under `name`, those of the next one begin."""
        self.turns[name] = self.peak, self.flops
        self.peak, self.flops = self.live, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs := kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        storages = lambda tree: {id(s): s for s in (t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))}  # noqa: E731
        new = {name: storage for name, storage in storages(out).items() if name not in self.known}
        for name in new.keys() - storages((args, kwargs)).keys() if new else ():
            self._born(name, new[name])
        self.peak = max(self.peak, self.live)
        return out

    def _born(self, name, storage):
        size = storage.nbytes()
        self.live += size
        self.known.add(name)
        weakref.finalize(storage, self._died, name, size)

    def _died(self, name, size):
        self.live -= size
        self.known.discard(name)


def measure(config, kinds, distil, prefer):
    """One loop of each kind on one sample -> the cast, {kind: {player: (bytes at the peak, operations) from the step before to its step}}."""
    measured, every = {}, config.rl_ratio + 1 if config.stage == 2 else 1
    draw = lambda purpose: sample_generators(0, 1, [0], purpose)  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True):
        cast = assemble(config, 1)
        c, picture = cast.encoder.encode(["a"]), torch.empty(1, 3, config.resolution, config.resolution)
        for kind in kinds:
            loop = every * (1 if kind == IDLE else config.ttur)  # every TTUR-th of the loops that distil updates G
            with Meter() as cast.meter:
                if kind == "preference":
                    prefer(cast, ["a"], c, draw)
                else:
                    distil(cast, loop, picture, ["a"], c, draw, watched=False)
            measured[kind] = {name: found for name, found in cast.meter.turns.items() if found[1]}
    return cast, measured


def count(module):
    return sum(p.numel() for p in module.parameters())


def states(cast, optimizer="adamw", frozen=2):
    """Rows of (component, parameters, bytes of weights, of gradients, of AdamW's two moments, whether FSDP2 shards it). frozen: bytes a weight."""
    with FakeTensorMode():
        words = count(CLIPTextModel(CLIP_L)) + count(CLIPTextModelWithProjection(CLIP_G))
    net, moment = cast.G.net, MOMENTS[optimizer]
    lora = sum(p.numel() for name, p in net.named_parameters() if ".student." in name)
    whole = count(net) - 2 * lora
    trained = lambda name, n, sharded=True: (name, n, 4 * n, 4 * n, moment * n, sharded)  # noqa: E731
    kept = lambda name, n, sharded=True, size=frozen: (name, n, size * n, 0, 0, sharded)  # noqa: E731
    rows = [kept("frozen network under the LoRAs" if lora else "teacher", whole)]
    rows += [trained("generator G", lora or whole), trained("score estimator", lora or whole)]
    rows += [kept("text encoders", words, False), kept("VAE", count(cast.vae), False, 4)]
    if cast.D:
        rows += [kept("SAM", count(cast.D.encoder[0]), False), trained("D's heads", count(cast.D), False)]
    if cast.head:
        rows += [trained("latent discriminator's head", count(cast.head), False)]
    if cast.R:
        eye = count(cast.R.unet)
        rows += [kept("reference", whole), kept("reward model's UNet", eye), kept("its projection", count(cast.R) - eye, False)]
        rows += [kept("its text encoders", words, False), ("moments of the preference updates", 0, 0, 0, moment * (lora or whole), True)]
    return rows


def gathered(cast):
    """Bytes of FSDP2's gathered blocks: bf16, the largest one and the next."""
    return 2 * 2 * max(map(count, blocks(cast.G.net)))


def a_gpu(rows, gpus):
    """Bytes on each of `gpus`, as train.py shards them."""
    return sum(sum(parts) / (gpus if sharded else 1) for parts, sharded in ((r[2:5], r[5]) for r in rows))


def report(config, distil, prefer):
    """Print what the run needs, and whether it fits -> bytes a GPU at the peak, without the allowance; distil, prefer: train.py's.

    Raises UserError for a preset of another geometry, and for a batch that the GPUs cannot share.
    """
    if not config.preset.startswith(("sdxl", "sd3")):
        raise UserError(f"--dry-run knows the geometry of SDXL and SD3-Medium, not that of --preset {config.preset}: give one of their presets")
    if config.fake_lora or config.gan == "online" or config.stage == "reward":
        raise UserError("--dry-run knows neither DMDR (--fake-lora) nor AdvDMD (--gan online) nor --stage reward yet")
    if config.preset.startswith("sd3") and (config.stage == 2 or config.gan == "latent"):
        raise UserError("--dry-run knows SD3 in stage 1 with --gan pixel alone: it has no latent reward model and no bottleneck")
    if config.batch_size % config.gpus or config.batch_size // config.gpus % (config.micro_batch or 1):
        raise UserError(f"--batch-size {config.batch_size} is not divisible by --gpus {config.gpus}, or a GPU's share of it not by --micro-batch")
    began, gpus, share = time.time(), config.gpus, config.batch_size // config.gpus
    print(f"{config.preset}: stage {config.stage}, {config.resolution} pixels, batch {config.batch_size}, {gpus} GPUs of {config.gpu_memory:g} GB\n")
    kinds = {"distillation": 1} | ({IDLE: config.ttur - 1} if config.ttur > 1 else {})  # how often each kind of loop comes
    if config.stage == 2:
        kinds = {"preference": config.rl_ratio * config.ttur} | ({} if config.rl_only else kinds)
    cast, measured = measure(config, kinds, distil, prefer)
    rows, open_blocks = states(cast, config.optimizer), gathered(cast)
    sharded, whole = (a_gpu(rows, n) + open_blocks for n in (gpus, 1))

    def show(name, n, *gb):
        print(f"{name:34}{n / 1e6:14.1f}" + "".join(f"{v / 1e9:{w}.2f}" for v, w in zip(gb, (10, 11, 9, 12, 14, 16))))

    saved = lambda row: (row[2] + row[4]) * bool(row[4])  # noqa: E731  what is trained, and its moments
    print(f"{'GB':34}{'parameters, M':>14}{'weights':>10}{'gradients':>11}{'moments':>9}{'checkpoint':>12}{'a GPU, whole':>14}{'a GPU, sharded':>16}")
    for row in rows:
        show(*row[:5], saved(row), a_gpu([row], 1), a_gpu([row], gpus))
    show("FSDP2's gathered blocks", 0, 0, 0, 0, 0, open_blocks, open_blocks)
    show("sum", *(sum(r[n] for r in rows) for n in (1, 2, 3, 4)), sum(map(saved, rows)), whole, sharded)
    print("\nsharded over 1, 2, 8, 64 GPUs: " + ", ".join(f"{(a_gpu(rows, n) + open_blocks) / 1e9:.2f}" for n in (1, 2, 8, 64)) + " GB on each")
    student = 4 * next(r[1] for r in rows if r[0] == "generator G")
    disk, copied = student + sum(map(saved, rows)), sum(saved(row) / (gpus if row[5] else 1) for row in rows)
    print(
        f"a checkpoint: {disk / 1e9:.1f} GB on disk, {student / 1e9:.1f} of them the student for diffusers, which rank 0 gathers in host memory"
        + (f"; every rank copies {copied / 1e9:.1f} GB there before they are written" if config.optimizer == "adamw" else "")
    )

    print(f"\n{'one sample, from one optimizer step to the next':50}{'GB at the peak':>15}{'TFLOP':>10}")
    for kind, turns in measured.items():
        for name, (peak, flops) in turns.items():
            print(f"{f'{kind}: {TURNS[name]}':50}{peak / 1e9:15.2f}{flops / 1e12:10.1f}")
    cost = sum(kinds[kind] * sum(flops for _, flops in turns.values()) for kind, turns in measured.items()) / sum(kinds.values())
    hours, mean = config.iterations * config.batch_size * cost / (config.gpu_tflops * 1e12) / 3600, " (mean of the kinds)" if len(kinds) > 1 else ""
    print(f"{f'an iteration of {config.batch_size} samples{mean}':65}{config.batch_size * cost / 1e12:10.1f}")
    print(f"{config.iterations} x {config.batch_size} samples at {config.gpu_tflops:g} sustained TFLOP/s: {hours:.1f} GPU-hours")

    peak, at_once, free = max(peak for turns in measured.values() for peak, _ in turns.values()), config.micro_batch or share, 1 - ALLOWANCE
    most = lambda held, gb=config.gpu_memory: max(0, int((gb * 1e9 * free - held) // peak))  # noqa: E731
    print(f"\n{f'a GPU, {ALLOWANCE:.0%} kept free':50}{f'{at_once} at once, GB':>15}{'most at once':>15}")
    for layout, held in (("whole, as DDP would hold it", whole), ("sharded", sharded)):
        print(f"{layout:50}{(held + at_once * peak) / free / 1e9:15.1f}{most(held):15}")

    fewest, divisors = {}, [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for optimizer in dict.fromkeys((config.optimizer, "adamw8bit")):
        held = states(cast, optimizer)
        found = {gb: next((n for n in divisors if most(a_gpu(held, n) + open_blocks, gb)), None) for gb in (24, 48, 80, 141)}
        fewest[optimizer] = " or ".join(f"{n} x {gb} GB" for gb, n in found.items() if n) or "more GPUs than samples"
    least, light = fewest[config.optimizer], fewest["adamw8bit"]
    fits, most_light = at_once <= most(sharded), most(a_gpu(states(cast, "adamw8bit"), gpus) + open_blocks)
    print(
        f"\nverdict: {'fits' if fits else 'does NOT fit'} on {gpus} x {config.gpu_memory:g} GB"
        + ("" if fits else f" (helps: {', '.join(remedies(config, measured, share, most(sharded), most_light))})")
        + f"; one sample at once needs at least {least}"
        + (f" (--optimizer adamw8bit: {light})" if light != least else "")
    )
    print(f"({time.time() - began:.0f} s)")
    return sharded + at_once * peak


def remedies(config, measured, share, most, most_light):
    """What to change where more is asked for than the `most` samples that fit at once; `most_light`: with moments in 8 bits."""
    turns = measured.get("distillation", {})
    if not config.checkpointing:
        yield "--checkpointing"
    if most:
        yield f"--micro-batch {max(n for n in range(1, most + 1) if share % n == 0)}"
    if most_light > most:
        yield f"--optimizer adamw8bit: {most_light} at once"
    if "D" in turns and max(turns, key=turns.get) == "G" and not config.gan_crop:
        yield f"--gan-crop {config.resolution // 2}: less of the VAE and SAM"
    if share > 1:
        yield "more GPUs"
    elif not most:
        yield "a lower --resolution"
