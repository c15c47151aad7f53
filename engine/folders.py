"""Where pipeline folders are, and what they hold. Nothing here loads torch: a missing folder is reported at once."""

import json
import os
import re
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from engine.errors import UserError

HERE = Path(__file__).parent.parent  # the project: toy/sdxl is found from any working directory
PARTS = ("unet", "transformer")  # folders of denoisers
INDEX = "model_index.json"
CONVERT = "from diffusers import StableDiffusionXLPipeline as P; P.from_single_file({!r}).save_pretrained({!r})"
WEIGHTS = re.compile(  # of diffusers and transformers: whole or in parts, of a variant ("fp16") or none
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+))??(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)"
    r"(?:\.index(?:\.(\w+))?\.json)?"
)


def folder(path, *parts, hub=True):
    """The path of a local folder that holds `parts` (files or folders), or a hub name unchanged.

    A relative path is looked up in the working directory, then in the project. Raises UserError for a folder that is
    missing or incomplete.
    """
    found = next((p for p in (Path(path), HERE / path) if p.is_dir()), None)
    if found is None:
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith(("toy/", "runs/"))
        if hub and named and not str(path).endswith((".safetensors", ".ckpt")) and not Path(path).exists():
            return str(path)
        raise UserError(f"no such folder: {path} (give a diffusers pipeline folder, such as toy/sdxl)")
    for part in parts:
        if not (found / part).exists():
            raise UserError(f"{path} is incomplete: it lacks {part} (download or build the folder again)")
    return str(found)


def check_sam(path):
    """The kind of a segment_anything checkpoint, "vit_b", "vit_l" or "vit_h"; None for a folder with an image encoder.

    Raises UserError for a path that is neither.
    """
    if not str(path).endswith(".pth"):
        folder(path, "config.json", "image_encoder.safetensors", hub=False)
        return None
    kind = re.search(r"vit_[blh]", Path(path).name)
    if not Path(path).is_file() or not kind:
        raise UserError(f"no SAM checkpoint at {path} (expected a file named like sam_vit_b_01ec64.pth)")
    return kind[0]


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


def check_holds(path, beginning, flag):
    """Raises UserError where a folder cannot be written to, or holds things but none whose name begins so."""
    names = os.listdir(path) if os.path.isdir(path) else []
    if names and not any(name.startswith(beginning) for name in names):
        raise UserError(f"{path} holds something else: give another {flag}")
    check_writable(path, flag)


def index_of(model):
    """model_index.json of a pipeline folder or hub name, as a dict. Raises UserError, which says what else it is."""
    path = next((p for p in (Path(model), HERE / model) if p.exists()), None)
    if path and not (path / INDEX).is_file():
        raise UserError(f"{model} is no pipeline folder (it lacks {INDEX}): {what_else(path)}")
    return read_json(model, INDEX)


def what_else(path):
    """What a path is that is no pipeline folder, and what to do with it."""
    singles = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.ckpt"))
    if any(path.glob("checkpoint-*")):
        return f"it is a run; make a pipeline of its student with: python export.py {path} FOLDER"
    if any((path / name).exists() for name in ("adapter_config.json", "pytorch_lora_weights.safetensors")):
        return "it is a LoRA; merge it into its pipeline by diffusers' load_lora_weights, fuse_lora and save_pretrained"
    if (path / "config.json").is_file() or any((path / part).is_dir() for part in PARTS):
        return "it is a network alone; give the folder of the whole pipeline that it belongs to, with it in its place"
    if singles and singles[0].suffix in (".safetensors", ".ckpt"):
        new = str(singles[0].with_suffix(""))
        return f'single files are converted, once, with: python -c "{CONVERT.format(str(singles[0]), new)}"'
    return "give a diffusers pipeline folder, such as toy/sdxl"


def read_json(model, name):
    """A JSON file of a pipeline folder or hub name, as a dict. Raises UserError where it is missing or torn."""
    where = folder(model)
    path = Path(where, name) if Path(where).is_dir() else from_hub(where, name)
    if not path.is_file():
        raise UserError(f"{model} is incomplete: it lacks {name} (download or build the folder again)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{name} of {model} is torn: download or build the folder again")
    return found


@cache
def from_hub(model, name):
    """Download a file of a hub repository -> its path. Raises UserError where that fails."""
    from huggingface_hub import hf_hub_download  # it loads slowly, and most runs use local folders

    try:
        return Path(hf_hub_download(model, name))
    except Exception as e:  # no network, no such repository, a gated one: the hub has an error for each
        raise out_of_reach(model, name, e) from None


def on_disk(model, part=""):
    """A local folder that holds `part` of a pipeline folder or hub name, and the variant of its weights or None.

    Of a hub name, the part's configs and the weights of one variant are downloaded; without a network, what an earlier
    download left in the hub's cache is used. Raises UserError where that fails.
    """
    if Path(model).is_dir():
        return model, variant_of(path.name for path in Path(model, part).glob("*"))
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        try:
            names = HfApi().list_repo_files(model)
        except Exception:  # no network, or HF_HUB_OFFLINE: as in from_hub
            cached = Path(snapshot_download(model, local_files_only=True))
            names = [str(path.relative_to(cached)) for path in cached.rglob("*")]
        inside = [Path(name).name for name in names if Path(name).parent == Path(part)]
        variant = variant_of(inside)
        weights = [name for name in inside if variant in variants([name])]
        weights = [name for name in weights if ".safetensors" in name] or weights
        if not inside:
            raise FileNotFoundError(f"it is neither in the repository nor, offline, in {HF_HUB_CACHE}")
        small = [name for name in inside if name.endswith((".json", ".txt", ".jinja"))]
        kept = weights + [name for name in small if not WEIGHTS.fullmatch(name)]
        return snapshot_download(model, allow_patterns=[str(Path(part, name)) for name in kept]), variant
    except Exception as e:
        raise out_of_reach(model, part, e) from None


def variants(names):
    """The variants of weights among file names: {None} for plain ones, "fp16" of model.fp16.safetensors."""
    found = [WEIGHTS.fullmatch(name) for name in names]
    return {next(filter(None, match.groups()), None) for match in found if match}


def variant_of(names):
    """The variant to load among file names: None, the plain one, where there is one or no weights at all."""
    found = variants(names)
    return None if None in found or not found else "fp16" if "fp16" in found else min(found)


def out_of_reach(model, part, error):
    """The UserError for a part of hub repository `model` that cannot be downloaded."""
    what = f"{part} of {model}" if part else model
    return UserError(
        f"cannot get {what} from the hub: download it, and give its folder in place of the name ({first_line(error)})"
    )


def first_line(error):
    """The first line of an error's text, or the error's type where the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
