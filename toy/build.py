"""Trains the toy's weights from nothing: VAE, CLIP, SDXL-shaped teacher, SAM image encoder, latent reward model.

    python -m toy.build              all parts, in this order; a part already built is kept
    python -m toy.build --rebuild    forget what is there and train again; if interrupted, go on without --rebuild
    python -m toy.build --only vae   one part

An interrupted part goes on where it stopped (its state lies in toy/.build). Each part adds what it reached to toy/quality.json.
"""

import argparse
import json
import shutil
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, logging

from diffusion import Schedule, add_noise, backward_simulation, guided, sample_ode
from models import Denoiser, PromptEncoder, load_vae
from pixel_gan import sam_input
from toy import world
from toy.fit import HERE, accuracies, batch_of, crowd_of, fit, forget_path, report, scenes
from toy.reward import build_lrm

logging.set_verbosity_error()  # a CLIP's text half loads with a page of "unexpected" vision weights
MAX_TOKENS = 32
GUIDANCE = 3.0


# ------------------------------------------------------------------------------------------- 1. the VAE


def build_vae():
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )

    def loss(step):
        images, _ = crowd_of(16)
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        return F.l1_loss(rebuilt, images) + F.mse_loss(rebuilt, images) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    began = time.time()
    fit("vae", [vae], loss, steps=2400, lr=2e-3)
    vae.eval().requires_grad_(False)
    images, captions, _ = scenes(500, "test")
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample()
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
        rebuilt = vae.decode(latents).sample
    vae.half().save_pretrained(HERE / "sdxl" / "vae")
    report("checker", 0, {"prompt_accuracy": 1.0}, **accuracies(images, captions))
    report("vae", time.time() - began, {"prompt_accuracy": 0.97}, mse=F.mse_loss(rebuilt, images).item(), **accuracies(rebuilt, captions))


# ------------------------------------------------------------------------------------------- 2. the CLIP


def build_tokenizer():
    """A byte-level BPE whose merges make every word of the world one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((world.scene(i)[1] for i in range(2000)), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = learnt["vocab"]
    for letter in alphabet:  # CLIP's vocabulary has every byte twice: inside a word and at its end
        vocab.setdefault(letter + "</w>", len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in learnt["merges"]], model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")
    return tokenizer


def altered(text, generator, often_place=0.0):
    """The caption with one fact made false: another colour, shape, size, fill, row, column or background."""
    words = text.split(" ")
    kinds = [tuple(world.COLORS), world.SHAPES, tuple(world.SIZES), world.FILLS, world.ROWS, world.COLUMNS, tuple(world.BACKGROUNDS)]
    spots = [(i, kind) for i, w in enumerate(words) for kind in kinds if w in kind]
    places = [(i, kind) for i, kind in spots if kind in (world.ROWS, world.COLUMNS)]
    if places and torch.rand((), generator=generator) < often_place:  # what CLIP learns last
        spots = places
    i, kind = spots[torch.randint(len(spots), (), generator=generator)]
    others = [w for w in kind if w != words[i]]
    words[i] = others[torch.randint(len(others), (), generator=generator)]
    return " ".join(words)


def build_clip():
    tokenizer = build_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3, "projection_dim": 64}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS},
            vision_config={**shape, "image_size": world.SIZE, "patch_size": 8},
            projection_dim=64,
        )
    )
    clip.vision_model.embeddings.position_embedding.weight.data *= 10  # as strong as a patch's content, or places are not learnt
    batch = 64
    tokens = lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")  # noqa: E731

    def loss(step):
        images, captions, _ = batch_of(batch)
        generator = torch.Generator().manual_seed(step)
        wrong = [altered(c, generator, often_place=0.5) for c in captions]
        out = clip(**tokens(captions + wrong), pixel_values=images)
        target = torch.arange(batch)
        return (F.cross_entropy(out.logits_per_image, target) + F.cross_entropy(out.logits_per_text[:batch], target)) / 2

    began = time.time()
    fit("clip", [clip], loss, steps=3200, lr=1e-3, weight_decay=0.01)
    clip.eval().requires_grad_(False)
    images, captions, _ = scenes(500, "test")
    wrong = [altered(c, torch.Generator().manual_seed(i)) for i, c in enumerate(captions)]
    with torch.no_grad():
        logits = clip(**tokens(captions + wrong), pixel_values=images).logits_per_image
    right = (logits[:, :500].diagonal() > logits[:, 500:].diagonal()).float().mean().item()
    found = (logits[:, :500].argmax(1) == torch.arange(500)).float().mean().item()
    for folder in (HERE / "clip", HERE / "sdxl" / "tokenizer", HERE / "sdxl" / "tokenizer_2"):
        tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size=world.SIZE, crop_size=world.SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(HERE / "clip")
    clip.half().save_pretrained(HERE / "clip")
    report("clip", time.time() - began, {"right_caption_over_altered": 0.9}, right_caption_over_altered=right, retrieval_of_500=found)


# --------------------------------------------------------------------------------------- 3. the teacher


def build_teacher():
    where = HERE / "sdxl"
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, cls in encoders.items():
        cls.from_pretrained(HERE / "clip").half().save_pretrained(where / name)
    prompt_encoder, vae, schedule = PromptEncoder(where, world.SIZE), load_vae(where), Schedule()
    text = prompt_encoder.encode(["a red circle"])
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
        cross_attention_dim=text["tokens"].shape[-1],
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=text["pooled"].shape[-1] + 6 * 16,
    )
    teacher = Denoiser(unet, schedule)

    began, batch = time.time(), 32
    images, captions, _ = scenes()
    latents = torch.cat([vae.encode(part) for part in tqdm(images.split(128), desc="latents", mininterval=5)])
    encoded = [prompt_encoder.encode(captions[i : i + 256]) for i in tqdm(range(0, len(captions), 256), desc="captions", mininterval=5)]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}

    def loss(step):
        """eps-prediction with guidance's dropout, and an x_0 error where eps' own weight (SNR) is small.

        What the caption decides (which shape, which colour) is decided at high noise, where SNR is 1/100.
        """
        which = torch.randint(len(latents), (batch,))
        x_0, t, eps = latents[which], torch.randint(1000, (batch,)), torch.randn(batch, 4, 16, 16)
        c = {k: v[which] for k, v in conditions.items()}
        kept = (torch.rand(batch) >= 0.1).float()  # the null prompt is zeros
        c = {"tokens": c["tokens"] * kept[:, None, None], "pooled": c["pooled"] * kept[:, None], "size": c["size"]}
        x_0_hat = teacher(add_noise(schedule, x_0, t, eps), t, c)
        snr = schedule.weight(t)
        return ((snr + (20 * snr).clamp(max=1)) * (x_0_hat - x_0) ** 2).mean()

    fit("teacher", [unet], loss, steps=10000, lr=1e-3)
    unet.eval().requires_grad_(False)
    scheduler = EulerDiscreteScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae.net.half(),
        text_encoder=prompt_encoder.encoders[0].half(),
        text_encoder_2=prompt_encoder.encoders[1].half(),
        tokenizer=prompt_encoder.tokenizers[0],
        tokenizer_2=prompt_encoder.tokenizers[1],
        unet=unet.half(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(where)
    forget_path(where)

    for part in (vae.net, unet, *prompt_encoder.encoders):
        part.float()
    _, prompts, _ = scenes(200, "test")
    c, z = prompt_encoder.encode(prompts), torch.randn(200, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    reached = {}
    with torch.no_grad():
        for w in (1.0, GUIDANCE):
            denoiser = guided(teacher, prompt_encoder.null(), w)
            fifty, four = sample_ode(denoiser, z, c, 50), backward_simulation(denoiser, z, c, schedule.steps(4), generators)
            reached[f"prompt_accuracy_50_steps_guidance_{w:g}"] = accuracies(vae.decode(fifty), prompts)["prompt_accuracy"]
            reached[f"prompt_accuracy_4_steps_guidance_{w:g}"] = accuracies(vae.decode(four), prompts)["prompt_accuracy"]
    report("teacher", time.time() - began, **reached)


# ---------------------------------------------------------------------------------- 4. the image encoder


SAM = {  # segment_anything.modeling.ImageEncoderViT
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "out_chans": 48,
    "use_rel_pos": True,
    "window_size": 4,
    "global_attn_indexes": [1, 3],
}


def build_sam():
    encoder = ImageEncoderViT(**SAM, norm_layer=nn.LayerNorm)
    classes = 1 + 2 * len(world.SHAPES)
    head = nn.Conv2d(SAM["out_chans"], classes * 64, 1)  # a class for each of a patch's 8 x 8 pixels
    segment = lambda images: F.pixel_shuffle(head(encoder(sam_input(images, SAM["img_size"]))), 8)  # noqa: E731

    def loss(step):
        images, masks = crowd_of(48)
        return F.cross_entropy(segment(images), masks)

    began = time.time()
    fit("sam", [encoder, head], loss, steps=2000, lr=2e-3)
    images, _, masks = scenes(500, "test")
    with torch.no_grad():
        guess = segment(images).argmax(1)
    folder = HERE / "sam"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SAM, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in encoder.state_dict().items()}, folder / "image_encoder.safetensors")
    right = (guess == masks).float()
    report("sam", time.time() - began, pixel_accuracy=right.mean().item(), object_pixel_accuracy=right[masks > 0].mean().item())


# ------------------------------------------------------------------------------------------------- main

PARTS = {
    "vae": ("sdxl/vae", build_vae),
    "clip": ("clip", build_clip),
    "teacher": ("sdxl/unet", build_teacher),
    "sam": ("sam", build_sam),
    "lrm": ("lrm", build_lrm),
}  # name -> (folder, function)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="build this part alone")
    parser.add_argument("--rebuild", action="store_true", help="train parts again that are already there")
    args = parser.parse_args()
    path = HERE / "quality.json"
    quality = json.loads(path.read_text()) if path.exists() else {}
    if args.rebuild:
        shutil.rmtree(HERE / ".build", ignore_errors=True)
        quality = {k: v for k, v in quality.items() if args.only not in (None, k)}
        path.write_text(json.dumps(quality, indent=2) + "\n")
    for name, (folder, build) in PARTS.items():
        if args.only in (None, name):
            if name in quality and (HERE / folder).exists():  # quality.json is written last
                print(f"{name}: already built in toy/{folder}")
                continue
            shutil.rmtree(HERE / folder, ignore_errors=True)
            torch.manual_seed(0)
            build()


if __name__ == "__main__":
    main()
