"""Pipeline folders of random weights, small enough to be made and run in a test."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 64  # of the transformer's text tokens, and of T5
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def tiny_sd3(folder, t5=True, sd35=False):
    """Write an SD3 pipeline with 16 latent channels, 8 pixels a latent, 64 pixels a side -> folder, as a string.

    CLIP's prompts have 77 tokens of the toy's tokenizer, T5's (where t5) one a letter; without T5, diffusers loads it
    with text_encoder_3=None, tokenizer_3=None. sd35: qk norm and dual attention.
    """
    torch.manual_seed(0)
    parts = {"tokenizer_3": t5_tokenizer() if t5 else None, "text_encoder_3": t5_encoder() if t5 else None}
    for n, width in (("", 24), ("_2", 32)):
        parts[f"tokenizer{n}"] = words = CLIPTokenizer.from_pretrained("toy/sdxl/tokenizer", model_max_length=77)
        parts[f"text_encoder{n}"] = clip_text(width, words)
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if sd35 else {}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=24 + 32,
        pos_embed_max_size=8,
        **newer,
    )
    for p in transformer.parameters():  # so that prompts show: as built, their part is near zero
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts).save_pretrained(folder)
    return str(folder)


def clip_text(width, tokenizer):
    """A CLIP text encoder for a tokenizer's words."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5_tokenizer():
    """T5's kind of tokenizer, in which each letter is a word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=special + [(letter, -3.0) for letter in LETTERS], extra_ids=0, model_max_length=512)


def t5_encoder():
    config = T5Config(
        vocab_size=4 + len(LETTERS),
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)
