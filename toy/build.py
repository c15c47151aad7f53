"""Trains the toy's weights: VAE, CLIP, teachers (teacher.py), SAM's image encoder, reward models, student.

    python -m toy.build                       all parts that are not built yet
    python -m toy.build --rebuild             delete all parts and train them again; if interrupted, omit --rebuild
    python -m toy.build --only sd3            one part
    python -m toy.build --only vae --rebuild  one part again; deletes the parts trained on it: run toy.build next

A teacher in SD3's shape takes 66 minutes; the others take about 80 together, the reward model of its latents aside.
An interrupted part goes on where it stopped (its state is in toy/.build). The metrics of each part are in
toy/quality.json.
"""

import argparse
import json
import shutil
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, logging

from pixel_gan import sam_input
from toy import world
from toy.fit import HERE, accuracies, batch_of, crowd_of, fit, report, scenes
from toy.reward import build_lrm, build_sd3_lrm
from toy.student import build_student
from toy.teacher import build_sd3, build_sdxl

logging.set_verbosity_error()  # a CLIP's text half loads with a page of "unexpected" vision weights
MAX_TOKENS = 32


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
        weighted_kl = 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(rebuilt, images) + F.mse_loss(rebuilt, images) + weighted_kl

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
    report(
        "vae",
        time.time() - began,
        {"prompt_accuracy": 0.97},
        mse=F.mse_loss(rebuilt, images).item(),
        **accuracies(rebuilt, captions),
    )


# ------------------------------------------------------------------------------------------- 2. the CLIP


def build_tokenizer():
    """A byte-level BPE whose merges make every word of the world one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator((world.scene(i)[1] for i in range(2000)), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = learnt["vocab"]
    for letter in alphabet:  # CLIP's vocabulary has every byte twice: inside a word and at its end
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(m) for m in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def altered(text, generator, often_place=0.0):
    """The caption with one fact made false: another colour, shape, size, fill, row, column or background."""
    words = text.split(" ")
    kinds = [
        tuple(world.COLORS),
        world.SHAPES,
        tuple(world.SIZES),
        world.FILLS,
        world.ROWS,
        world.COLUMNS,
        tuple(world.BACKGROUNDS),
    ]
    spots = [(i, kind) for i, w in enumerate(words) for kind in kinds if w in kind]
    places = [(i, kind) for i, kind in spots if kind in (world.ROWS, world.COLUMNS)]
    if places and torch.rand((), generator=generator) < often_place:  # CLIP learns places last
        spots = places
    i, kind = spots[torch.randint(len(spots), (), generator=generator)]
    others = [w for w in kind if w != words[i]]
    words[i] = others[torch.randint(len(others), (), generator=generator)]
    return " ".join(words)


def build_clip():
    tokenizer = build_tokenizer()
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 64,
    }
    clip = CLIPModel(
        CLIPConfig(
            text_config={**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS},
            vision_config={**shape, "image_size": world.SIZE, "patch_size": 8},
            projection_dim=64,
        )
    )
    # positions as strong as a patch's content: otherwise CLIP does not learn places
    clip.vision_model.embeddings.position_embedding.weight.data *= 10
    batch = 64
    tokens = lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")  # noqa: E731

    def loss(step):
        images, captions, _ = batch_of(batch)
        generator = torch.Generator().manual_seed(step)
        wrong = [altered(c, generator, often_place=0.5) for c in captions]
        out = clip(**tokens(captions + wrong), pixel_values=images)
        target = torch.arange(batch)
        of_images = F.cross_entropy(out.logits_per_image, target)
        of_texts = F.cross_entropy(out.logits_per_text[:batch], target)
        return (of_images + of_texts) / 2

    began = time.time()
    fit("clip", [clip], loss, steps=3200, lr=1e-3, weight_decay=0.01)
    clip.eval().requires_grad_(False)
    reached = measure_clip(clip, tokens)
    tokenizer.save_pretrained(HERE / "clip")
    half = [0.5] * 3
    pixels = CLIPImageProcessorPil(size=world.SIZE, crop_size=world.SIZE, image_mean=half, image_std=half)
    pixels.save_pretrained(HERE / "clip")
    clip.half().save_pretrained(HERE / "clip")
    report("clip", time.time() - began, {"right_caption_over_altered": 0.9}, **reached)


@torch.no_grad()
def measure_clip(clip, tokens):
    """On 500 held-out scenes: how often the caption scores above itself with a false fact, and above the 499 others."""
    images, captions, _ = scenes(500, "test")
    wrong = [altered(c, torch.Generator().manual_seed(i)) for i, c in enumerate(captions)]
    logits = clip(**tokens(captions + wrong), pixel_values=images).logits_per_image
    right = (logits[:, :500].diagonal() > logits[:, 500:].diagonal()).float().mean().item()
    found = (logits[:, :500].argmax(1) == torch.arange(500)).float().mean().item()
    return {"right_caption_over_altered": right, "retrieval_of_500": found}


# ---------------------------------------------------------------------------------- 3. the image encoder


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
    report(
        "sam",
        time.time() - began,
        pixel_accuracy=right.mean().item(),
        object_pixel_accuracy=right[masks > 0].mean().item(),
    )


# ------------------------------------------------------------------------------------------------- main

PARTS = {
    "vae": ("sdxl/vae", build_vae, []),
    "clip": ("clip", build_clip, []),
    "teacher": ("sdxl/unet", build_sdxl, ["vae", "clip"]),
    "sam": ("sam", build_sam, []),
    "lrm": ("lrm", build_lrm, ["vae", "clip", "teacher"]),
    "sd3": ("sd3", build_sd3, ["vae", "clip"]),
    "sd3_lrm": ("sd3_lrm", build_sd3_lrm, ["vae", "clip", "sd3"]),
    "student": ("student", build_student, ["vae", "clip", "teacher", "sam", "lrm"]),
}  # name -> (folder, function, parts it is trained on)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="build this part alone")
    parser.add_argument("--rebuild", action="store_true", help="delete the parts and train them again")
    args = parser.parse_args(argv)
    path = HERE / "quality.json"
    quality = json.loads(path.read_text()) if path.exists() else {}
    if args.rebuild:
        shutil.rmtree(HERE / ".build", ignore_errors=True)
        for name, (folder, _, parts) in PARTS.items():
            if args.only in (None, name, *parts):
                quality.pop(name, None)
                shutil.rmtree(HERE / folder, ignore_errors=True)
        path.write_text(json.dumps(quality, indent=2) + "\n")
    for name, (folder, build, _) in PARTS.items():
        if args.only in (None, name):
            if name in quality and (HERE / folder).exists():  # quality.json is written last
                print(f"{name}: already built in toy/{folder}")
                continue
            shutil.rmtree(HERE / folder, ignore_errors=True)
            torch.manual_seed(0)
            build()


if __name__ == "__main__":
    main()
