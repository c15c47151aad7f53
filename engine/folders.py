"""Where pipeline folders are, and what they hold. Nothing here loads torch: a missing folder is reported at once."""

import json
import re
from pathlib import Path

from engine.errors import UserError

HERE = Path(__file__).parent.parent  # the project: toy/sdxl is found from any working directory
PIPELINES = {"StableDiffusionXLPipeline": "unet", "StableDiffusion3Pipeline": "transformer"}


def folder(path, *parts, hub=True):
    """The path of a local folder that holds `parts` (files or folders), or a hub name unchanged.

    A relative path is looked up in the working directory, then in the project. Raises UserError for a folder that is
    missing or incomplete.
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


def part_of(model):
    """The name of the denoiser in pipeline folder (or hub name) `model`: "unet" (SDXL) or "transformer" (SD3).

    Raises UserError for a pipeline of another kind, and for an index that cannot be read.
    """
    where = folder(model, "model_index.json")
    index = Path(where, "model_index.json") if Path(where).is_dir() else from_hub(model, "model_index.json")
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        kind = None
    if kind not in PIPELINES:
        raise UserError(f"{model} is a {kind}: only {' and '.join(PIPELINES)} are supported")
    return PIPELINES[kind]


def from_hub(model, name):
    """Download a file of a hub repository -> its path. Raises UserError where that fails."""
    from huggingface_hub import hf_hub_download  # it loads slowly, and most runs use local folders

    try:
        return Path(hf_hub_download(model, name))
    except Exception as e:  # no network, no such repository, a gated one: the hub has an error for each
        raise out_of_reach(model, "", e) from None


def out_of_reach(model, part, error):
    """The UserError for a part of hub repository `model` that cannot be downloaded."""
    what = f"{part} of {model}" if part else model
    return UserError(
        f"cannot get {what} from the hub: download it, and give its folder in place of the name ({first_line(error)})"
    )


def first_line(error):
    """The first line of an error's text, or the error's type where the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
