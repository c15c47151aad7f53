"""SD3 and SD3.5 as base models: a transformer on tokens of two CLIPs and T5; a flow with one shift.

The contract that this file fulfils is in engine/base_model.py. Nothing here loads torch before it is called.

A condition has L tokens of the two CLIPs (77), joined along the width and padded with zeros to the transformer's, then
M of T5, its last state. T5 sees no mask: its states depend on M, which belongs to the student (in diffusers
`max_sequence_length`). Without T5: L tokens of zeros, as many as CLIP's.
"""

from pathlib import Path

from engine import parts
from engine.errors import UserError
from engine.folders import folder, index_of, read_json
from engine.parts import ATTENTION, FEED_FORWARD, TEXT_ATTENTION, check_part, check_parts, latents_agree

NAME = "SD3"
PIPELINE = "StableDiffusion3Pipeline"
PART = "transformer"
NETWORK = "SD3Transformer2DModel"
VAE = "AutoencoderKL"
TEXT = {"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection"}
TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
T5 = {"tokenizer_3": "T5TokenizerFast", "text_encoder_3": "T5EncoderModel"}
REWARD = "transformer"
SIZES = False
EMPTY = ""
UNGUIDED = "guidance_scale=0"
SHIFT_NODE = "ModelSamplingSD3"  # ComfyUI's, which shifts the noise levels
MODULATION = ["norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"]  # of tokens, by t and the prompt
LAYERS = [*ATTENTION, *TEXT_ATTENTION, *FEED_FORWARD, *MODULATION]

guidance = parts.linear_guidance
vae = parts.same
schedule = parts.flow_schedule
student_scheduler = parts.flow_student
null_is_zero = parts.never
block_name = parts.joint_block_name
map_shape = parts.joint_map_shape
as_map = parts.joint_as_map


def check(model):
    """Raises UserError for a part that is lacking or of another class, and for a setting that training ignores."""
    check_parts(model, {PART: NETWORK, "vae": VAE, **TEXT})
    parts.flow_scheduler(model)
    channels = read_json(model, "vae/config.json").get("latent_channels", 4)
    latents_agree(model, PART, channels, unused=("latents_mean", "latents_std"))


def t5_of(model, t5=""):
    """Whether T5 reads the prompts of pipeline folder (or hub name) `model`: "on" or "off".

    t5: --t5 or a run's, by default on where the folder has T5. Raises UserError for "on" where it has none, and for
    a T5 that cannot be used.
    """
    found = (index_of(model).get("text_encoder_3") or [None])[-1]
    if t5 == "off" or not t5 and found is None:
        return "off"
    if found is None:
        raise UserError(f"{model} has no text_encoder_3, and --t5 on wants one: give a --model that has T5")
    try:
        check_part(model, "text_encoder_3", T5["text_encoder_3"])
        if Path(folder(model)).is_dir():
            folder(model, "tokenizer_3")
    except UserError as e:
        raise e if t5 else UserError(f"{e}, or pass --t5 off") from None
    width = read_json(model, "text_encoder_3/config.json").get("d_model")
    wanted = read_json(model, "transformer/config.json").get("joint_attention_dim")
    if width != wanted:
        raise UserError(f"{model}: transformer has joint_attention_dim {wanted}, its text_encoder_3 is {width} wide")
    return "on"


def sides(model):
    """-> pixels of which a picture's sides are multiples, and the most that its table of positions has."""
    net = read_json(model, "transformer/config.json")
    step = parts.vae_factor(model) * net["patch_size"]
    return step, step * (net["pos_embed_max_size"] or net["sample_size"] // net["patch_size"])


def pipeline_settings(model):
    """Settings of the exported pipeline beside its parts: none of T5, which it may lack."""
    return {"text_encoder_3": None, "tokenizer_3": None}


def call(steps, encoder):
    """The arguments of a student's call in diffusers beside prompt, guidance and size, and a line on its text.

    Sigmas are those before the shift.
    """
    length = encoder.text_length or encoder.tokenizers[0].model_max_length
    line = f"- Text: without T5; {length} tokens of zeros stand for its own.\n"
    if encoder.text_length:
        line = f"- Text: T5 reads {length} tokens, as in training. Its states depend on `max_sequence_length`.\n"
    return f"sigmas={[n / steps for n in range(steps, 0, -1)]}, max_sequence_length={length}", line


# ---------------------------------------------------------------------------------------------- prompts


def words(model, t5="", text_length=256):
    """-> {folder: class} of what reads prompts, and the settings that conditions depend on: the width of tokens, and M.

    t5: "on", "off", or "" = where the folder has one. Raises UserError for "on" without T5.
    """
    width = read_json(model, "transformer/config.json")["joint_attention_dim"]
    length = text_length if t5_of(model, t5) == "on" else 0
    return {**TOKENIZERS, **TEXT, **(T5 if length else {})}, {"width": width, "text_length": length}


def text(encoder, prompts):
    """tokens (B, L + M, width) and pooled (B, p1 + p2) of B strings."""
    import torch
    import torch.nn.functional as F

    c = encoder.clip(prompts)
    tokens = F.pad(c["tokens"], (0, encoder.width - c["tokens"].shape[-1]))
    more = torch.zeros_like(tokens)
    if encoder.text_length:
        more = encoder.encoders[2](encoder.ids(encoder.tokenizers[2], prompts, encoder.text_length))[0].float()
    return {"tokens": torch.cat([tokens, more], 1), "pooled": c["pooled"]}


def longest(encoder):
    """T5's where there is one: that CLIP reads 77 tokens of a long prompt is as it should be."""
    return encoder.text_length or encoder.tokenizers[0].model_max_length


def lengths(encoder, prompts):
    """How many tokens each of the prompts has."""
    tokenizer = encoder.tokenizers[2 if encoder.text_length else 0]
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]


# ------------------------------------------------------------------------------------------- the network


def output(net, x_t, t, c):
    """The network's own output. x_t (B, C, h, w), tokens and pooled in its dtype."""
    return net(x_t, c["tokens"], c["pooled"], t, return_dict=False)[0]


def blocks(net):
    """The parts whose weights FSDP2 gathers together, of a whole transformer or of a reward model's first blocks."""
    return [net.pos_embed, net.time_text_embed, net.context_embedder, *net.transformer_blocks]
