"""Pipeline folders of random weights, small enough to be made and run in a test."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
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
    loud(transformer)
    vae = small_vae(scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts).save_pretrained(folder)
    return str(folder)


def tiny_z_image(folder):
    """Write a Z-Image pipeline with 16 latent channels, 8 pixels a latent -> folder. Each byte is a token."""
    torch.manual_seed(0)
    words = byte_tokenizer()
    turn = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    words.chat_template = turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = Qwen3Model(Qwen3Config(vocab_size=len(words), num_key_value_heads=1, head_dim=16, **sizes))
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=48,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 16, 16],
    )
    ZImagePipeline(
        transformer=loud(transformer),
        vae=small_vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        text_encoder=loud(text),
        tokenizer=words,
    ).save_pretrained(folder)
    return str(folder)


def tiny_qwen(folder):
    """Write a Qwen-Image pipeline with 16 latent channels, 8 pixels a latent -> folder. Each byte is a token."""
    torch.manual_seed(0)
    words = byte_tokenizer()
    text = {"vocab_size": len(words), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48}
    transformer = QwenImageTransformer2DModel(
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 6, 6),
    )
    shifts = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    QwenImagePipeline(
        transformer=loud(transformer),
        vae=loud(AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1), 1.0),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
        text_encoder=loud(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))),
        tokenizer=words,
    ).save_pretrained(folder)
    return str(folder)


def loud(net, gain=1.5):
    """In place: larger weights, so that prompts show, whose part is near zero as built -> net."""
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=gain * p[0].numel() ** -0.5)
    return net


def small_vae(**scaling):
    """An AutoencoderKL with 16 channels and 8 pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **scaling,
    )


def byte_tokenizer():
    """Qwen's kind of tokenizer, in which each byte is a word."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special, pad_token=special[0])


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
