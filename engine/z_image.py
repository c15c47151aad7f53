"""Z-Image as a base model: a transformer on lists of pictures and of Qwen3's tokens; a flow with one shift.

The contract that this file fulfils is in engine/base_model.py. Nothing here loads torch before it is called.

The network's time is 1 - s, its output -v. Our guidance scale w is w - 1 in its pipeline.
Z-Image-Turbo is the same network, distilled: a start for a student, but no teacher.
"""

from engine import parts
from engine.folders import read_json
from engine.parts import ATTENTION, check_parts, latents_agree

NAME = "Z-Image"
PIPELINE = "ZImagePipeline"
PART = "transformer"
NETWORK = "ZImageTransformer2DModel"
VAE = "AutoencoderKL"
TEXT = {"text_encoder": "Qwen3Model"}
TOKENIZERS = {"tokenizer": "Qwen2Tokenizer"}
REWARD = ""  # no latent reward model of its latents is published
SIZES = False
EMPTY = ""
UNGUIDED = "guidance_scale=0"
SHIFT_NODE = "ModelSamplingAuraFlow"
MOST_TOKENS = 512  # of a prompt and its template, as the pipeline cuts them
MODULATION = r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.0|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)"
# a regular expression: as an ending, "adaLN_modulation.0" would also name the final layer's activation
LAYERS = rf".*\.({'|'.join(ATTENTION)}|w1|w2|w3)|{MODULATION}".replace("to_out.0", r"to_out\.0")
FIXED = {"all_patch_size": [2], "all_f_patch_size": [1], "siglip_feat_dim": None}  # of the network

guidance = parts.linear_guidance
vae = parts.same
schedule = parts.flow_schedule
student_scheduler = parts.flow_student
null_is_zero = parts.never
pipeline_settings = parts.no_settings
call = parts.plain_call


def check(model):
    """Raises UserError for a part that is lacking or of another class, and for a setting that training ignores."""
    check_parts(model, {PART: NETWORK, "vae": VAE, **TEXT})
    parts.flow_scheduler(model)
    channels = read_json(model, "vae/config.json").get("latent_channels", 4)
    latents_agree(model, PART, channels, unused=("latents_mean", "latents_std"), in_channels=channels)
    parts.fixed(model, PART, FIXED)


def sides(model):
    """-> pixels of which a picture's sides are multiples, and that none is too long."""
    return 2 * parts.vae_factor(model), None


# ---------------------------------------------------------------------------------------------- prompts


def words(model, **text):
    """-> {folder: class} of what reads prompts, and the settings that conditions depend on: none."""
    return {**TOKENIZERS, **TEXT}, {}


def templated(encoder, prompts):
    """Each prompt as a user's turn of a chat, before the answer."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return [encoder.tokenizers[0].apply_chat_template(turn, **how) for turn in turns]


def text(encoder, prompts):
    """tokens (B, L, D), the last state but one, and mask (B, L) of B strings."""
    how = {"padding": True, "truncation": True, "max_length": MOST_TOKENS, "return_tensors": "pt"}
    found = encoder.tokenizers[0](templated(encoder, prompts), **how).to(encoder.device)
    states = encoder.encoders[0](**found, output_hidden_states=True).hidden_states[-2]
    return parts.masked([row[mask] for row, mask in zip(states, found["attention_mask"].bool())])


def longest(encoder):
    """How many tokens of a prompt and its template are read."""
    return MOST_TOKENS


def lengths(encoder, prompts):
    """How many tokens each of the prompts has with its template."""
    return [len(ids) for ids in encoder.tokenizers[0](templated(encoder, prompts), verbose=False).input_ids]


# ------------------------------------------------------------------------------------------- the network


def output(net, x_t, t, c):
    """The network's own output with the sign of v. x_t (B, C, h, w) and tokens in its dtype."""
    import torch

    tokens = parts.real_tokens(c)
    pictures = list(x_t.unsqueeze(2))  # (C, 1, h, w) each
    found = net(pictures, (1000 - t) / 1000, tokens, return_dict=False)[0]
    return -torch.stack(found).squeeze(2)


def blocks(net):
    """The parts whose weights FSDP2 gathers together; the tokens that pad are the root's."""
    stem = [net.t_embedder, net.cap_embedder, net.all_x_embedder["2-1"]]
    return [*stem, *net.noise_refiner, *net.context_refiner, *net.layers]


def block_name(net, where):
    """The middle or the last block."""
    return parts.block_of("layers", len(net.layers), where)


def map_shape(net, side, where):
    """The width and the side of that block's map, where latents have this side."""
    return net.dim, side // 2


def as_map(net, output, size):
    """A block's output (B, n + padding, D), picture tokens first -> a map (B, D, h/2, w/2)."""
    return parts.square_of_tokens(output[:, : size[0] * size[1] // 4], size)
