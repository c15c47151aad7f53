"""A diffusers pipeline folder -> Denoiser, prompt encoder, VAE; a SAM folder or checkpoint -> image encoder.

Everything that knows about SDXL's and SD3's classes lives here; the losses see callables and tensors.
`model` is a local folder in the diffusers pipeline layout (toy/sdxl, toy/sd3) or a hub name.
"""

import json
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion import Schedule, backward_simulation, randn, sample_generators, sample_ode

HERE = Path(__file__).parent
PARTS = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}  # what a denoiser is called in a pipeline folder, and its class
PIPELINES = {"StableDiffusionXLPipeline": "unet", "StableDiffusion3Pipeline": "transformer"}


class UserError(Exception):
    """A mistake of the user's: the scripts print its one line and exit with status 2."""


def folder(path, *parts, hub=True):
    """A local folder that must hold `parts` (files or folders), searched from here and from the project; or a hub name, as it is.

    Raises UserError for a folder that is missing or half-written.
    """
    found = next((p for p in (Path(path), HERE / path) if p.is_dir()), None)
    if found is None:
        if hub and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith(("toy/", "runs/")):
            return str(path)
        raise UserError(f"no such folder: {path} (give a diffusers pipeline folder, such as toy/sdxl)")
    for part in parts:
        if not (found / part).exists():
            raise UserError(f"{path} is incomplete: it lacks {part} (download or build the folder again)")
    return str(found)


def load_part(cls, path, sub="", how="from_pretrained", **kwargs):
    try:
        return getattr(cls, how)(path, **({"subfolder": sub} if sub else {}), **kwargs)
    except Exception as e:  # the libraries raise OSError, ValueError, SafetensorError, ...: all mean that this part cannot be read
        if not Path(path).is_dir():
            why, part = (str(e).strip() or type(e).__name__).splitlines()[0], f"{sub} of {path}" if sub else path
            raise UserError(f"cannot get {part} from the hub: download it, and give its folder in place of the name ({why})") from None
        raise UserError(f"cannot read {sub or 'model_index.json'} of {path}: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from None


def part_of(model):
    """What the denoiser of pipeline folder (or hub name) `model` is called there: "unet" (SDXL) or "transformer" (SD3)."""
    config = load_part(DiffusionPipeline, folder(model, "model_index.json"), how="load_config")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in PIPELINES:
        raise UserError(f"{model} is a {kind}: only {' and '.join(PIPELINES)} are supported")
    return PIPELINES[kind]


def part_name(net):
    """The same of a network."""
    return next(name for name, cls in PARTS.items() if isinstance(net, cls))


class Denoiser:
    """(x_t, t, c) -> x_0, the clean estimate of an SDXL UNet or SD3 transformer. x_t, x_0 (B, C, h, w); t (B,); c from load_encoder's.

    The network computes in `dtype`; the estimate is formed in fp32. Several Denoisers may share one network, each with `scales`
    of its own for the LoRAs in it (lora_scale); the backward pass puts them back, for a checkpointed block runs again there.
    """

    def __init__(self, net, schedule, dtype=torch.float32, scales=None):
        self.net, self.schedule, self.dtype, self.scales = net, schedule, dtype, scales or {}
        self.passes = 0  # forward passes so far, in samples; a pass with gradient counts as 3 (its backward costs two forwards)

    def __call__(self, x_t, t, c):
        self.passes += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        x, c, scales = x_t.to(self.dtype), {k: v if k == "size" else v.to(self.dtype) for k, v in c.items()}, self.scales  # bf16 rounds sizes
        if scales:
            lora_scale(self.net, scales)
        if isinstance(self.net, SD3Transformer2DModel):
            output = self.net(x, c["tokens"], c["pooled"], t, return_dict=False)[0]
        else:
            added = {"text_embeds": c["pooled"], "time_ids": c["size"]}
            output = self.net(x, t, c["tokens"], added_cond_kwargs=added, return_dict=False)[0]
        if scales and output.requires_grad:
            output.register_hook(lambda grad: lora_scale(self.net, scales))
        return self.schedule.x_0(output, x_t, t)

    def with_features(self, x_t, t, c):
        """-> (x_0, the mid block's output (B, C, h', w')): what a discriminator on the network's bottleneck sees (latent_gan.py)."""
        kept = []
        handle = self.net.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            return self(x_t, t, c), kept[0]
        finally:
            handle.remove()


LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]  # attention,
LAYERS += ["proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"]  # feed-forward and residual layers, as diffusers names them,
LAYERS += ["norm1.linear", "norm1_context.linear", "norm_out.linear"]  # and those that modulate SD3's tokens by t and the prompt


def add_lora(net, rank, *names, dtype=torch.float32):
    """In place: the network's weights freeze, kept in `dtype`, and a trainable fp32 LoRA (peft) of this rank joins every one of LAYERS under each
    of `names`.

    All are in force at once, and all start as the same zero update B A; lora_scale says how much each adds.
    """
    net.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes a second LoRA for a mistake
        for name in names:
            net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), name)
    net.set_adapter(list(names))
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            for name in names[1:]:
                layer.lora_A[name].load_state_dict(layer.lora_A[names[0]].state_dict())
    for p in net.parameters():
        if not p.requires_grad:  # only now: peft gives a LoRA the type of its layer
            p.data = p.data.to(dtype)


def lora_scale(net, scales):
    """In place: the strength of each of the net's LoRAs, {name: factor of B A}. At 0 a LoRA changes nothing, to the bit."""
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            for name, scale in scales.items():
                layer.set_scale(name, scale)


def load_schedule(model):
    """The noise schedule of a pipeline folder's (or hub name's) scheduler config."""
    config = load_part(FlowMatchEulerDiscreteScheduler, folder(model, "scheduler/scheduler_config.json"), "scheduler", how="load_config")
    try:
        if config["_class_name"] == "FlowMatchEulerDiscreteScheduler":
            return Schedule("flow", shift=config["shift"])
        if config.get("prediction_type", "epsilon") == "epsilon" and config["beta_schedule"] == "scaled_linear":
            return Schedule("eps", config["beta_start"], config["beta_end"])
    except (KeyError, TypeError) as e:
        raise UserError(f"scheduler/scheduler_config.json of {model} lacks {e}") from None
    raise UserError(f"{model}: only eps-prediction with scaled_linear betas (SDXL) and flow matching (SD3) are supported")


def load_denoiser(model, device="cpu", dtype=torch.float32, student=None):
    """The denoiser of pipeline folder `model`, or the one in the checkpoint folder `student` (whole; or a LoRA, which is merged), fp32.

    The schedule is that of `model`.
    """
    part, lora = part_of(model), student is not None and (Path(student) / "lora").is_dir()
    where = folder(model, "model_index.json", part) if student is None or lora else str(student)
    net = load_part(PARTS[part], where, part, low_cpu_mem_usage=False)
    if lora:
        load_part(net, str(student), "lora", "load_lora_adapter", prefix=part, weight_name="pytorch_lora_weights.safetensors")
        net.fuse_lora()
        net.unload_lora()
    return Denoiser(net.float().to(device), load_schedule(model), dtype)


class PromptEncoder:
    """SDXL's two frozen text encoders. encode(prompts) -> c: tokens (B, L, d1 + d2), pooled (B, p), size (B, 6)."""

    classes = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32, tokenizers=None):
        """tokenizers: another folder to take the tokenizers from."""
        path, words = folder(model, "text_encoder", "text_encoder_2"), folder(tokenizers or model, "tokenizer", "tokenizer_2")
        self.tokenizers = [load_part(CLIPTokenizer, words, f"tokenizer{n}") for n in ("", "_2")]
        self.encoders = [load_part(cls, path, f"text_encoder{n}").to(device, dtype).eval().requires_grad_(False) for n, cls in self.classes.items()]
        self.size, self.device, self.warned = image_size, device, False

    @torch.no_grad()
    def encode(self, prompts, sizes=None):
        """prompts: a list of B strings; sizes (B, 6) of the pictures (data.py), by default those of a whole square.

        Warns, once, of a prompt that is cut off at the encoders' length.
        """
        if not self.warned and any(map(self.too_long, prompts)):
            self.warned = True
            long, length = next(filter(self.too_long, prompts)), self.tokenizers[0].model_max_length
            print(f"warning: prompts are cut off after {length} tokens, the first of them: {long[:60]!r} ...", file=sys.stderr)
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
            out = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            if isinstance(encoder, CLIPTextModelWithProjection):
                pooled.append(out[0])  # SDXL: the second encoder's alone
        if sizes is None:
            sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], dtype=torch.float32).expand(len(prompts), 6)
        return {"tokens": torch.cat(states, -1).float(), "pooled": torch.cat(pooled, -1).float(), "size": sizes.to(self.device)}

    def too_long(self, prompt):
        """Whether `prompt` has more tokens than the encoders take."""
        tokenizer = self.tokenizers[0]
        return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length

    def null(self):
        """The null prompt's condition, batch of one: zeros, as SDXL's pipeline has it (`force_zeros_for_empty_prompt`)."""
        c = self.encode([""])
        return {"tokens": torch.zeros_like(c["tokens"]), "pooled": torch.zeros_like(c["pooled"]), "size": c["size"]}


class SD3Encoder(PromptEncoder):
    """SD3's, without its T5: encode(prompts) -> tokens (B, 2 L, joint), pooled (B, p1 + p2).

    The two CLIPs' tokens side by side, padded with zeros to the transformer's width, then the missing T5's tokens, all zeros:
    as many as CLIP has. In diffusers that is `max_sequence_length=L` (77).
    """

    classes = {"": CLIPTextModelWithProjection, "_2": CLIPTextModelWithProjection}

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32):
        super().__init__(model, image_size, device, dtype)
        self.width = load_part(SD3Transformer2DModel, folder(model, "transformer"), "transformer", how="load_config")["joint_attention_dim"]

    def encode(self, prompts, sizes=None):
        """sizes: SDXL's alone, not looked at."""
        c = super().encode(prompts)
        tokens = F.pad(c["tokens"], (0, self.width - c["tokens"].shape[-1]))
        return {"tokens": torch.cat([tokens, torch.zeros_like(tokens)], 1), "pooled": c["pooled"]}

    def null(self):
        """The encoded empty prompt, batch of one."""
        return self.encode([""])


def load_encoder(model, image_size, device="cpu", dtype=torch.float32):
    """The prompt encoder of pipeline folder `model`."""
    cls = {"unet": PromptEncoder, "transformer": SD3Encoder}[part_of(model)]
    return cls(model, image_size, device, dtype)


def blocks(net):
    """The parts of a denoiser, or of a reward model's, whose weights FSDP2 gathers together."""
    # The stem too: where gradient reaches the mid block's features alone (latent_gan.py), the root's own weights would not be gathered.
    if isinstance(net, SD3Transformer2DModel):
        return [net.pos_embed, net.time_text_embed, net.context_embedder, *net.transformer_blocks]
    return [net.conv_in, net.time_embedding, net.add_embedding, *net.down_blocks, net.mid_block, *(net.up_blocks or ())]


class VAE(nn.Module):
    """The pipeline's frozen autoencoder, between images in [-1, 1] (B, 3, H, W) and scaled latents (B, C, h, w), in fp32.

    Without gradient it takes at_once pictures together, however many are asked for.
    """

    def __init__(self, net):
        """net: an AutoencoderKL."""
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.channels = self.net.config.latent_channels
        self.factor = 2 ** (len(self.net.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images):
        """The posterior mean, scaled."""
        config = self.net.config
        means = torch.cat([self.net.encode(part).latent_dist.mean for part in images.split(at_once(images.shape[-1]))])
        return (means - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, z):
        """V: latents -> images. Gradient passes through it to z, never to its weights."""
        config = self.net.config
        z = z / config.scaling_factor + (config.shift_factor or 0)
        together = len(z) if z.requires_grad and torch.is_grad_enabled() else at_once(z.shape[-1] * self.factor)
        return torch.cat([self.net.decode(part, return_dict=False)[0] for part in z.split(together)])


def at_once(side):
    """How many pictures of `side` pixels are drawn or encoded together where no batch is given: 64 of the toy's, 4 at 1024."""
    return max(1, min(64, 2**22 // side**2))


def load_vae(model, device="cpu"):
    """The autoencoder of pipeline folder `model`."""
    return VAE(load_part(AutoencoderKL, folder(model, "vae"), "vae", low_cpu_mem_usage=False).float()).to(device)


def load_sam(path, device="cpu", dtype=torch.float32):
    """segment_anything's image encoder, frozen, in `dtype`: from a folder (config.json, image_encoder.safetensors) or one of its own
    checkpoints (sam_vit_b_*.pth, sam_vit_l_*.pth, sam_vit_h_*.pth)."""
    if str(path).endswith(".pth"):
        kind = re.search(r"vit_[blh]", Path(path).name)
        if not Path(path).is_file() or not kind:
            raise UserError(f"no SAM checkpoint at {path} (expected a file named like sam_vit_b_01ec64.pth)")
        build = lambda: sam_model_registry[kind[0]](checkpoint=str(path)).image_encoder  # noqa: E731
    else:
        where = Path(folder(path, "config.json", "image_encoder.safetensors", hub=False))

        def build():
            encoder = ImageEncoderViT(**json.loads((where / "config.json").read_text()), norm_layer=nn.LayerNorm)
            encoder.load_state_dict({k: v.float() for k, v in load_file(where / "image_encoder.safetensors").items()})
            return encoder

    try:
        encoder = build()
    except Exception as e:
        raise UserError(f"cannot read the SAM image encoder in {path}: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from None
    return encoder.to(device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def generate(denoiser, encoder, vae, prompts, steps, seed, first=0, batch=None, ode=False):
    """Prompts -> pictures (n, 3, H, W) in [-1, 1] on the CPU, `batch` (by default at_once) of them together.

    The picture of (seed, prompt, first + place in the list) is the same at every batch size. Few-step sampling re-noises
    between steps (diffusion.backward_simulation); ode=True follows the multi-step teacher's deterministic path.
    """
    side, pictures, batch = encoder.size // vae.factor, [], batch or at_once(encoder.size)
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        c = encoder.encode(part)
        generators = sample_generators(seed, 0, range(first + i, first + i + len(part)), "sample")
        z = randn(generators, torch.empty(len(part), vae.channels, side, side, device=encoder.device))
        x_0 = sample_ode(denoiser, z, c, steps) if ode else backward_simulation(denoiser, z, c, denoiser.schedule.steps(steps), generators)
        pictures.append(vae.decode(x_0).clamp(-1, 1).cpu())
    return torch.cat(pictures)
