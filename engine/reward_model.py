"""Reads and writes latent reward models: SD3's are in engine/dina_lrm.py, SDXL's in LPO's published layout, here.

unet/, text_encoder/, text_encoder_2/      diffusers and transformers folders; R drops the UNet's up blocks
state_dict.pt                              {"visual_projection": {"weight"}, "logit_scale"}
"""

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from engine import dina_lrm
from engine.errors import UserError
from engine.folders import folder, part_of
from engine.models import load_part
from engine.prompts import PromptEncoder
from engine.reward_layout import kind_of
from latent_reward import LatentRewardModel


def untrained_reward_model(model, image_size, device="cpu"):
    """An untrained R, fp32, of pipeline folder `model`.

    SDXL: its UNet and its text encoders, with a random projection; SD3: engine/dina_lrm.py's.
    """
    if part_of(model) == "transformer":
        return dina_lrm.untrained(model, image_size, device)
    encoder = PromptEncoder(model, image_size, device)
    unet = load_part(UNet2DConditionModel, folder(model, "unet"), "unet", low_cpu_mem_usage=False).float()
    return LatentRewardModel(unet, encoder, encoder.encoders[1].config.projection_dim).to(device)


def load_reward_model(path, image_size, tokenizers=None, device="cpu", dtype=torch.float32, encoder=None):
    """R from a folder in either published layout, frozen, in `dtype`, but for logit_scale: a number, kept fp32.

    tokenizers: the pipeline folder of the tokenizers, where this one has none. encoder: that of the run's prompts,
    whose networks SD3's R uses where they are its own. Raises UserError for a missing or unreadable part.
    """
    if kind_of(path) == "transformer":
        return dina_lrm.load(path, image_size, device, dtype, encoder)
    where = Path(folder(path, "unet", "text_encoder", "text_encoder_2", "state_dict.pt", hub=False))
    words = where if (where / "tokenizer").exists() else tokenizers
    unet = load_part(UNet2DConditionModel, str(where), "unet", low_cpu_mem_usage=False)
    encoder = PromptEncoder(str(where), image_size, device, dtype, tokenizers=words)
    R = LatentRewardModel(unet, encoder, encoder.encoders[1].config.projection_dim)
    try:
        state = torch.load(where / "state_dict.pt", map_location="cpu", weights_only=True)
        R.visual_projection.load_state_dict(state["visual_projection"])
        logit_scale = torch.as_tensor(state["logit_scale"], dtype=torch.float32, device=device)
    except Exception as e:  # another width, other keys, a torn file, pickled objects: torch has an error for each
        raise UserError(f"cannot read state_dict.pt of {path}: {str(e).strip().splitlines()[-1].strip()}") from None
    R.to(device, dtype).eval().requires_grad_(False)
    R.logit_scale.data = logit_scale  # scores are its exponential: in bf16 they, and the gaps of pairs, were 1 % off
    return R


def backbone(R):
    """The denoiser in R: a UNet without its up blocks, or a transformer's first blocks."""
    return R.transformer if isinstance(R, dina_lrm.DinaRewardModel) else R.unet


def save_reward_model(R, path, model, half=False):
    """Write the folder that load_reward_model reads, in fp32 or fp16 (half). model: the pipeline that R started from.

    LPO's layout has up blocks, R has none: those of `model` are written.
    """
    if isinstance(R, dina_lrm.DinaRewardModel):
        return dina_lrm.save(R, path, model, half)
    path = Path(path)
    dtype = torch.float16 if half else torch.float32
    whole = load_part(UNet2DConditionModel, folder(model, "unet"), "unet", low_cpu_mem_usage=False)
    weights = whole.state_dict()
    weights.update({k: v.cpu() for k, v in R.unet.state_dict().items()})
    whole.load_state_dict(weights)
    whole.to(dtype).save_pretrained(path / "unet")
    for name, net in zip(("text_encoder", "text_encoder_2"), R.encoder.encoders):
        copy.deepcopy(net).to("cpu", dtype).save_pretrained(path / name)
    projection = {"weight": R.visual_projection.weight.detach().to("cpu", dtype)}
    torch.save({"visual_projection": projection, "logit_scale": R.logit_scale.item()}, path / "state_dict.pt")
