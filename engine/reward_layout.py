"""Which published layout a latent reward model's folder has, and whether it fits a model. Nothing here loads torch.

LPO's, of SDXL (engine/reward_model.py)    unet/, text_encoder/, text_encoder_2/, state_dict.pt
DiNa-LRM's, of SD3 (engine/dina_lrm.py)    config.json, checkpoint/backbone_lora/, checkpoint/rm_head.pt

DiNa-LRM's is a LoRA and a head on the pipeline that its config.json names as "backbone_model_id", a folder or a hub
name; a folder or a link `backbone` beside config.json goes before it.
"""

from pathlib import Path

from engine.base_model import family_of
from engine.errors import UserError
from engine.folders import HERE, folder, read_json

LORA = "checkpoint/backbone_lora"
HEAD = "checkpoint/rm_head.pt"
FILES = {  # a pipeline's denoiser -> what the reward model of its latents consists of; the first tells the layout
    "unet": ("unet", "text_encoder", "text_encoder_2", "state_dict.pt"),
    "transformer": ("checkpoint", "config.json", f"{LORA}/adapter_config.json", HEAD),
}
NAMES = {"unet": ("SDXL", "LPO", "lrm"), "transformer": ("SD3", "DiNa-LRM", "sd3_lrm")}
FIXED = {"use_lora": True, "freeze_backbone": False, "use_text_features": True, "use_logistic": False}
FIXED_HEAD = {"use_proj_in": False, "width": -1, "out_dim": 1}


def beside(model):
    """Where a model's own reward model is: "lrm" (SDXL) or "sd3_lrm" (SD3) beside it. It need not exist."""
    return str(Path(model).parent / NAMES[kind_for(model)][2])


def reward_folder(config):
    """The latent reward model's folder: --reward, or "lrm" (SDXL) or "sd3_lrm" (SD3) beside the model.

    Raises UserError where there is none, and for one of other latents than the model's.
    """
    if config.reward == "clip":
        raise UserError("--reward clip is DMDR's, in stage 1: name the folder of a latent reward model")
    reward = config.reward or beside(config.model)
    check(reward, config.model)
    return reward


def kind_for(model):
    """The denoiser in a reward model of `model`'s latents: "unet" (SDXL) or "transformer" (SD3).

    Raises UserError where no reward model of these latents is published.
    """
    family = family_of(model)
    if not family.REWARD:
        why = "no latent reward model of its latents exists, only of SDXL's and SD3's"
        raise UserError(f"{model} is a {family.NAME}: {why}: no stage 2, and DMDR by --reward clip alone")
    return family.REWARD


def exists(path):
    """Whether `path` is a folder, in the working directory or in the project."""
    return any((root / path).is_dir() for root in (Path(), HERE))


def kind_of(path):
    """The denoiser whose latents the reward model in a folder scores: "unet" (SDXL) or "transformer" (SD3)."""
    if not exists(path):
        raise UserError(f"no latent reward model in {path}: name its folder with --reward")
    where = Path(folder(path, hub=False))
    for kind, (first, *_) in FILES.items():
        if (where / first).is_dir():
            return kind
    known = " nor ".join(f"{FILES[kind][0]}/ of {layout}'s layout" for kind, (_, layout, _) in NAMES.items())
    raise UserError(f"no latent reward model in {path}: it has neither {known}")


def check(path, model):
    """Raises UserError for a folder that is no reward model of `model`'s latents, or an incomplete one."""
    kind = kind_of(path)
    wanted = kind_for(model)
    if kind != wanted:
        (of, _, _), (other, layout, _) = NAMES[kind], NAMES[wanted]
        raise UserError(
            f"the reward model in {path} scores {of}'s latents, {model} is {other}'s: name one of {layout}'s layout"
        )
    folder(path, *FILES[kind], hub=False)
    base = backbone(path) if kind == "transformer" else path
    found = read_json(base, f"{kind}/config.json").get("in_channels")
    channels = read_json(model, "vae/config.json").get("latent_channels", 4)
    if found not in (None, channels):
        raise UserError(
            f"the reward model in {path} scores latents of {found} channels, those of {model} have {channels}"
        )


def settings(path):
    """What DiNa-LRM's config.json says of its model, a dict. Raises UserError for another shape than the published."""
    found = read_json(path, "config.json").get("model")
    found = found if isinstance(found, dict) else {}
    head = found.get("reward_head", {})
    depths = found.get("visual_head_idx")
    whole = isinstance(depths, list) and depths and all(isinstance(n, int) and n > 0 for n in depths)
    if not whole or depths != sorted(set(depths)) or depths[-1] != found.get("num_transformer_layers"):
        raise UserError(f"config.json of {path}: visual_head_idx {depths} must rise to num_transformer_layers")
    fixed = {**FIXED, "text_head_idx": depths}
    for values, wanted in ((found, fixed), (head, FIXED_HEAD)):
        for key, value in wanted.items():
            if values.get(key, value) != value:
                raise UserError(f"config.json of {path}: {key} {values[key]} is not supported, only {value}")
    return found


def backbone(path):
    """The pipeline folder (or hub name) that DiNa-LRM's LoRA in folder `path` belongs to.

    Raises UserError where it cannot be had, is no SD3, or has too few blocks.
    """
    depths = settings(path)["visual_head_idx"]
    linked = Path(folder(path, hub=False), "backbone")
    model = str(linked) if linked.exists() else str(settings(path).get("backbone_model_id"))
    try:
        if family_of(model).NAME != "SD3":
            raise UserError(f"{model} is no SD3")
        blocks = read_json(model, "transformer/config.json").get("num_layers", 0)
        if depths[-1] >= blocks:
            raise UserError(f"{model} has {blocks} blocks, text leaves the last one unread: {depths[-1]} is too deep")
    except UserError as e:
        remedy = f"give the pipeline that it was trained on as the link {path}/backbone"
        raise UserError(f"the reward model in {path} is a LoRA on {model}: {e}; {remedy}") from None
    return model
