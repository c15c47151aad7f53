"""Where pipeline folders are, and what they hold. Nothing here loads torch: a missing folder is reported at once."""

import json
import os
import re
import tempfile
from contextlib import suppress
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


def check_writable(path, flag):
    """Raises UserError where folder `path` cannot be made or written to; leaves nothing. flag: that names it."""
    path = Path(path)
    made = []
    try:
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        why = "it is a file" if os.path.isfile(path) else e.strerror
        raise UserError(f"cannot write to {path} ({why}): give another {flag}") from None
    finally:
        for new in made:
            with suppress(OSError):
                new.rmdir()


def check_new(path, flag):
    """Raises UserError where `path` cannot be made a new folder. flag: the one that names it."""
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise UserError(f"{path} is not empty: give another {flag}")
    check_writable(path, flag)


def check_size(model, size):
    """Raises UserError where the denoiser and the VAE of pipeline folder `model` cannot draw size = (height, width)."""
    part = part_of(model)
    net, vae = part_config(model, part), part_config(model, "vae")
    try:
        step = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels of a latent
        most = None
        if part == "unet":
            step *= 2 ** (len(net["block_out_channels"]) - 1)  # its down blocks halve the latents
        else:
            step *= net["patch_size"]
            patches = net["pos_embed_max_size"] or net["sample_size"] // net["patch_size"]  # of its table of positions
            most = step * patches
    except (KeyError, TypeError) as e:
        raise UserError(f"{model}: a config.json of {part} or vae lacks {e}") from None
    asked = "x".join(map(str, size))
    if any(side % step for side in size):
        near = "x".join(str(max(step, round(side / step) * step)) for side in size)
        raise UserError(f"--size {asked}: {model} draws multiples of {step} pixels, such as {near}")
    if most and max(size) > most:
        raise UserError(f"--size {asked}: {model} has positions for at most {most} pixels a side")


def part_config(model, part):
    """The config.json of a part of pipeline folder (or hub name) `model`, a dict. Raises UserError."""
    where = folder(model, f"{part}/config.json")
    path = Path(where, part, "config.json") if Path(where).is_dir() else from_hub(model, f"{part}/config.json")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"cannot read {part}/config.json of {model}: download it again") from None


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
