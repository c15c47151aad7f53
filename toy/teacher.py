"""The toy's two teachers, as pipelines: an SDXL-shaped UNet (eps) and an SD3-shaped transformer (flow, shift 3)."""

import os
import time

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion import Schedule, add_noise, backward_simulation, guided, sample_ode
from engine.base_model import part_of
from engine.models import Denoiser, load_vae
from engine.prompts import load_encoder
from toy import world
from toy.fit import HERE, accuracies, fit, forget_path, report, scenes

GUIDANCE = 5.0
SD3_TOKENS = 16  # of each CLIP, and of the missing T5: diffusers' max_sequence_length for toy/sd3


def build_sdxl():
    where = HERE / "sdxl"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 4, 4],  # diffusers' name for the number of heads
        use_linear_projection=True,
        cross_attention_dim=256,  # two text encoders of width 128
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,  # the pooled text, and six sizes
    )
    schedule = Schedule()
    clip = HERE / "clip"
    pipeline = StableDiffusionXLPipeline(
        vae=load_vae(where).net.half(),
        text_encoder=CLIPTextModel.from_pretrained(clip).half(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(clip).half(),
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        tokenizer_2=CLIPTokenizer.from_pretrained(clip),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
        ),
        force_zeros_for_empty_prompt=True,
    )

    def weight(t):
        """SNR, the weight of the eps error, plus min(20 SNR, 1).

        Shape and colour are decided at high noise, where SNR is 1/100.
        """
        snr = schedule.weight(t)
        return snr + (20 * snr).clamp(max=1)

    train_teacher("teacher", where, pipeline, unet, schedule, weight, steps=10000)


def build_sd3():
    where = HERE / "sd3"
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=256,  # two text encoders of width 128
        caption_projection_dim=96,
        pooled_projection_dim=128,  # their pooled texts
        pos_embed_max_size=8,
    )
    vae = load_vae(HERE / "sdxl").net.half()
    vae.register_to_config(shift_factor=0.0)
    text = lambda: CLIPTextModelWithProjection.from_pretrained(HERE / "clip").half()  # noqa: E731
    words = lambda: CLIPTokenizer.from_pretrained(HERE / "clip", model_max_length=SD3_TOKENS)  # noqa: E731
    schedule = Schedule("flow", shift=3.0)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=schedule.shift),
        vae=vae,
        text_encoder=text(),
        tokenizer=words(),
        text_encoder_2=text(),
        tokenizer_2=words(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    # Muon for the blocks' matrices: AdamW trains them too slowly (43 % of prompts right after 7,000 steps).
    matrices = [p for n, p in transformer.transformer_blocks.named_parameters() if p.ndim == 2 and "norm" not in n]
    train_teacher("sd3", where, pipeline, transformer, schedule, schedule.weight, steps=11000, muon=matrices)
    # VAE and text encoders are those of toy/sdxl: links, so that they are stored once
    for path in where.rglob("*.safetensors"):
        for twin in (HERE / "sdxl").rglob("*.safetensors"):
            if not path.is_symlink() and twin.read_bytes() == path.read_bytes():
                path.unlink()
                path.symlink_to(os.path.relpath(twin, path.parent))


def train_teacher(part, where, pipeline, net, schedule, weight, steps, batch=32, muon=()):
    """Trains `net`, the denoiser of `pipeline`, on weight(t) ‖x̂_0 - x_0‖², and saves the pipeline.

    One caption in ten is replaced by the null prompt, for guidance.
    """
    began = time.time()
    pipeline.save_pretrained(where)
    (where / part_of(where) / "diffusion_pytorch_model.safetensors").unlink()  # untrained
    encoder = load_encoder(where, world.SIZE)
    vae = load_vae(where)
    denoiser = Denoiser(net, schedule)
    images, captions, _ = scenes()
    latents = torch.cat([vae.encode(i) for i in tqdm(images.split(128), desc="latents", mininterval=5)])
    firsts = tqdm(range(0, len(captions), 256), desc="captions", mininterval=5)
    encoded = [encoder.encode(captions[i : i + 256]) for i in firsts]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}
    null = encoder.null()

    def loss(step):
        which = torch.randint(len(latents), (batch,))
        x_0 = latents[which]
        t = schedule.t_at(1 - torch.rand(batch))
        eps = torch.randn(batch, 4, 16, 16)
        dropped = torch.rand(batch) < 0.1
        c = {k: v[which] for k, v in conditions.items()}
        for k in c:
            c[k][dropped] = null[k]
        return (weight(t) * (denoiser(add_noise(schedule, x_0, t, eps), t, c) - x_0) ** 2).mean()

    fit(part, [net], loss, steps=steps, lr=1e-3, muon=muon)
    net.eval().requires_grad_(False).half()
    pipeline.save_pretrained(where)
    forget_path(where)

    net.float()
    report(part, time.time() - began, **measure(denoiser, encoder, vae))


@torch.no_grad()
def measure(denoiser, encoder, vae, count=200):
    """Prompt accuracy on held-out prompts: 50 steps (multi-step), 4 steps (few-step); unguided and guided."""
    _, prompts, _ = scenes(count, "test")
    c = encoder.encode(prompts)
    z = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    reached = {}
    for w in (1.0, GUIDANCE):
        teacher = guided(denoiser, encoder.null(), w)
        fifty = sample_ode(teacher, z, c, 50)
        four = backward_simulation(teacher, z, c, denoiser.schedule.steps(4), generators)
        for steps, x_0 in ((50, fifty), (4, four)):
            right = accuracies(vae.decode(x_0), prompts)["prompt_accuracy"]
            reached[f"prompt_accuracy_{steps}_steps_guidance_{w:g}"] = right
    return reached
