"""A diffusers pipeline folder -> Denoiser and VAE; a SAM folder or checkpoint -> image encoder.

`model` is a local folder in the diffusers pipeline layout (toy/sdxl, toy/sd3) or a hub name. What one base model has
for itself is in its file (engine/base_model.py), text encoders are in engine/prompts.py. The losses see none of these
classes, only callables and tensors.
"""

import json
import os
import threading
import warnings
from contextlib import contextmanager
from itertools import chain
from math import inf
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from tqdm import tqdm

from engine import base_model
from engine.base_model import family_of, family_of_net
from engine.errors import UserError
from engine.folders import check_sam, first_line, folder, on_disk
from engine.hidden import block_name, output_of
from engine.quantize import in_8_bits

LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


def load_part(cls, path, sub="", how="from_pretrained", **kwargs):
    """Part `sub` of a pipeline folder or hub name, by cls.how. Of weights in variants alone, fp16 is taken.

    Raises UserError where it cannot be loaded, and for weights that are not finite.
    """
    where, variant = on_disk(path, sub)
    if sub:
        kwargs["subfolder"] = sub
    if variant and how == "from_pretrained":
        kwargs["variant"] = variant
    try:
        with waiting(f"loading {sub or path}", gigabytes(Path(where, sub))):
            made = getattr(cls, how)(where, **kwargs)
    except Exception as e:  # the libraries raise OSError, ValueError, SafetensorError, ...
        raise UserError(f"cannot read {sub or 'the model'} of {path}: {first_line(e)}") from None
    if isinstance(made, nn.Module):
        check_finite(made, f"{sub or 'the model'} of {path}")
    return made


def check_finite(net, name):
    """Raises UserError for a network whose weights hold nan or inf: before training, which would be blamed for it."""
    for key, p in chain(net.named_parameters(), net.named_buffers()):
        if p.is_floating_point() and not torch.isfinite(p.sum(dtype=torch.float32)):  # a sum reads p once, in place
            raise UserError(f"{name} holds nan or inf, first in {key}: its weights are broken, get them again")


def gigabytes(path):
    """The size of a folder's files, or of a file; 0 where there is none."""
    path = Path(path)
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file()) / 1e9


@contextmanager
def waiting(what, size, short=0.2):
    """A bar beside a long call that says nothing itself, on rank 0: its seconds go on. None below `short` gigabytes."""
    if size < short or int(os.environ.get("RANK", 0)):
        yield
        return
    over = threading.Event()
    what += f", {size:.1f} GB" if size < inf else ""
    with tqdm(total=1, desc=what, bar_format="{desc}: {percentage:3.0f}% |{bar:10}| {elapsed}") as bar:

        def tick():
            while not over.wait(1):
                bar.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
            bar.update()
        finally:
            over.set()
            ticking.join()


@contextmanager
def at_work(name):
    """Add a note with the name of the running part to an error: monitor.out_of_memory reads it."""
    try:
        yield
    except RuntimeError as e:
        e.add_note(name)
        raise


class Denoiser:
    """(x_t, t, c) -> x_0, the clean estimate of a base model's network.

    x_t, x_0 (B, C, h, w); t (B,); c: the condition (engine/prompts.py). The network computes in `dtype`; x_0 is
    computed in fp32. Several Denoisers can use one network, each with its own `scales` of the network's LoRAs
    (lora_scale). The backward pass sets the scales again, because a checkpointed block is recomputed there.
    """

    def __init__(self, net, schedule, dtype=torch.float32, scales=None, name="a denoiser"):
        """name: its name in error messages."""
        self.net = net
        self.family = family_of_net(net)
        self.guidance = self.family.guidance  # (x_0, cond, x_t) -> x_0: the rule beside diffusion.guided's
        self.schedule = schedule
        self.dtype = dtype
        self.name = name
        self.scales = scales or {}
        self.block = block_name(net)  # whose output with_features gives
        # forward passes so far, in samples; one with gradient counts as 3 (its backward pass costs two forward passes)
        self.passes = 0

    def __call__(self, x_t, t, c):
        self.passes += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        scales = self.scales
        if scales:
            lora_scale(self.net, scales)
        with at_work(self.name):
            output = self.output(x_t.to(self.dtype), t, c)
        if scales and output.requires_grad:
            output.register_hook(lambda grad: lora_scale(self.net, scales))
        return self.schedule.x_0(output, x_t, t)

    def output(self, x_t, t, c):
        """The network's own output, in its own parameterisation. x_t (B, C, h, w) in `dtype`."""
        c = {k: v.to(self.dtype) if k in ("tokens", "pooled") else v for k, v in c.items()}
        return self.family.output(self.net, x_t, t, c)

    def with_features(self, x_t, t, c):
        """-> x_0, and the output of block `self.block` as a map (B, D, h', w'), for a discriminator."""
        with output_of(self.net, self.block) as outputs:
            x_0 = self(x_t, t, c)
        features = self.family.as_map(self.net, outputs[0], x_t.shape[-2:])
        if self.scales and features.requires_grad:  # a loss of the features alone sends no gradient to x_0
            features.register_hook(lambda grad: lora_scale(self.net, self.scales))
        return x_0, features


def add_lora(net, rank, *names, dtype=torch.float32, layers=None):
    """In place: freeze the network's weights, in `dtype`, and add a trainable fp32 LoRA (peft) per name.

    layers: what they adapt, by default the base model's LAYERS. lora_scale sets the strength of each. All start from
    one A, and from B = 0.
    """
    layers = layers or family_of_net(net).LAYERS
    net.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second LoRA
        for name in names:
            net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), name)
    net.set_adapter(list(names))
    net.lora_layers = [layer for layer in net.modules() if isinstance(layer, LoraLayer)]
    for layer in net.lora_layers:
        for name in names[1:]:
            layer.lora_A[name].load_state_dict(layer.lora_A[names[0]].state_dict())
    for p in net.parameters():  # only now: peft gives a LoRA the dtype of its layer
        if not in_8_bits(p):
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def lora_scale(net, scales):
    """In place: set the strengths of the network's LoRAs, {name: factor of B A}. At 0 a LoRA takes no part."""
    on = [name for name, scale in scales.items() if scale]
    for layer in net.lora_layers:
        layer._active_adapter = on  # peft's set_adapter would set requires_grad too, which FSDP2 has read already
        for name in on:
            layer.set_scale(name, scales[name])


def load_schedule(model, resolution=None):
    """The noise schedule of a pipeline folder's (or hub name's) scheduler config. Raises UserError for unknown ones.

    resolution: of square pictures, which some base models' schedules depend on; by default the model's own.
    """
    return family_of(model).schedule(model, resolution)


def load_denoiser(
    model, device="cpu", dtype=torch.float32, student=None, name="a denoiser", resolution=None, weights=torch.float32
):
    """The denoiser of pipeline folder `model`, or of checkpoint folder `student` (a LoRA is merged, in fp32).

    dtype: that it computes in; weights: that of its weights on the device. The schedule is that of `model` at this
    resolution. name: its name in error messages.
    """
    base_model.check(model)
    family = family_of(model)
    lora = student is not None and (Path(student) / "lora").is_dir()
    where = folder(model) if student is None or lora else str(student)
    how = {"low_cpu_mem_usage": False} | ({} if lora else {"torch_dtype": weights})  # 20 B in fp32 are 82 GB
    net = load_part(getattr(diffusers, family.NETWORK), where, family.PART, **how)
    if lora:
        load_part(net, str(student), "lora", "load_lora_adapter", prefix=family.PART, weight_name=LORA)
        net.fuse_lora()
        net.unload_lora()
        check_finite(net, f"lora of {student}")
    torch.nn.Module.to(net, weights)  # diffusers' own warns
    return Denoiser(net.to(device), load_schedule(model, resolution), dtype, name=name)


class VAE(nn.Module):
    """The pipeline's frozen autoencoder, in fp32: images (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, h, w).

    Without gradient it processes at most at_once pictures together.
    """

    def __init__(self, net):
        """net: an AutoencoderKL, or another with its interface."""
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        config = net.config
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        if config.get("latents_mean") and config.get("latents_std"):  # a number per channel
            std = torch.tensor(config.latents_std).view(-1, 1, 1)
            self.register_buffer("shift", torch.tensor(config.latents_mean).view(-1, 1, 1), persistent=False)
            self.register_buffer("scale", config.scaling_factor / std, persistent=False)
        else:
            self.shift = config.shift_factor or 0
            self.scale = config.scaling_factor

    @torch.no_grad()
    def encode(self, images):
        """The posterior mean, scaled: (mean - shift) * scale."""
        parts = images.split(at_once(*images.shape[-2:]))
        means = torch.cat([self.net.encode(part).latent_dist.mean for part in parts])
        return (means - self.shift) * self.scale

    def decode(self, z):
        """V: latents -> images, with gradient to z, not to V's weights."""
        z = z / self.scale + self.shift
        with_gradient = z.requires_grad and torch.is_grad_enabled()
        together = len(z) if with_gradient else at_once(*(side * self.factor for side in z.shape[-2:]))
        with at_work("the VAE"):
            return torch.cat([self.net.decode(part, return_dict=False)[0] for part in z.split(together)])


def at_once(height, width=None):
    """How many pictures of this size are drawn or encoded together by default: 64 of the toy's, 4 at 1024."""
    return max(1, min(64, 2**22 // (height * (width or height))))


def load_vae(model, device="cpu"):
    """The autoencoder of pipeline folder `model`."""
    family = family_of(model)
    net = load_part(getattr(diffusers, family.VAE), folder(model, "vae"), "vae", low_cpu_mem_usage=False)
    return VAE(family.vae(net.float())).to(device)


def load_sam(path, device="cpu", dtype=torch.float32):
    """segment_anything's image encoder, frozen, in `dtype`.

    path: a folder (config.json, image_encoder.safetensors) or a segment_anything checkpoint (sam_vit_b_*.pth,
    sam_vit_l_*.pth, sam_vit_h_*.pth). Raises UserError where it cannot be read.
    """
    kind = check_sam(path)

    def build():
        if kind:
            return sam_model_registry[kind](checkpoint=str(path)).image_encoder
        where = Path(folder(path, hub=False))
        encoder = ImageEncoderViT(**json.loads((where / "config.json").read_text()), norm_layer=nn.LayerNorm)
        encoder.load_state_dict({k: v.float() for k, v in load_file(where / "image_encoder.safetensors").items()})
        return encoder

    try:
        with waiting("loading SAM", gigabytes(path)):
            encoder = build()
    except Exception as e:
        raise UserError(f"cannot read the SAM image encoder in {path}: {first_line(e)}") from None
    check_finite(encoder, f"the SAM image encoder in {path}")
    return encoder.to(device, dtype).eval().requires_grad_(False)
