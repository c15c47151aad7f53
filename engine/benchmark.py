"""The paper's evaluation of real models (4.1): pictures for a file of prompts, their scores, and the paper's rows.

    python evaluate.py --run runs/NAME --prompts coco10k.txt --images DIR \\
        [--pick yuvalkirstain/PickScore_v1] [--scores DIR/hpsv2.json ...]

The pictures are DIR/00000.png and so on, one per line of the prompt file. Existing ones are not drawn again: a stopped
call goes on where it was. CLIP score and PickScore are cosines of CLIP embeddings, as the paper prints them (without
PickScore's factor of 100). HPSv2.1, ImageReward and MPS need packages with old dependencies: lab/external_scores.py
scores DIR in a separate environment, and --scores reads its JSON: {"HPSv2": mean or one score per picture}.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.coco import COLUMNS, PAPER
from engine.errors import UserError
from engine.models import at_once
from engine.pictures import generate, to_pil


def draw(denoiser, encoder, vae, prompts, folder, made_by, batch=None):
    """Writes the pictures of `prompts` that folder lacks.

    made_by: what they depend on: "steps", "seed", "ode" (whether by sample_ode) and more.
    Raises UserError where folder holds something else.
    """
    folder = Path(folder)
    now = made_by | {"prompts": prompts}
    batch = batch or at_once(encoder.size)
    settings = folder / "settings.json"
    if settings.is_file():
        try:
            before = json.loads(settings.read_text())
        except ValueError:
            before = "torn"
        if before != now:
            what = "pictures of other prompts, or of another model, steps or seed"
            raise UserError(f"{folder} holds {what}: give another --images")
    if not settings.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already (and no settings.json): give another --images")
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(now, indent=1) + "\n")
    for first in tqdm(range(0, len(prompts), batch), desc=f"pictures, {batch} at a time"):
        part = range(first, min(first + batch, len(prompts)))
        missing = [i for i in part if not picture(folder, i).is_file()]
        if missing:  # the whole batch: `first + place` seeds a picture's noise
            words = [prompts[i] for i in part]
            how = {"first": first, "batch": batch, "ode": made_by["ode"]}
            images = generate(denoiser, encoder, vae, words, made_by["steps"], made_by["seed"], **how)
            for i in missing:
                aside = picture(folder, i).with_suffix(".part")
                to_pil(images[i - first]).save(aside, format="PNG")
                aside.rename(picture(folder, i))


def picture(folder, i):
    """The file of the i-th picture."""
    return Path(folder) / f"{i:05d}.png"


def cosine_scores(clip, prompts, folder, batch=64):
    """metrics.Clip's score of each picture in folder with its prompt: a list."""
    scores = []
    for first in tqdm(range(0, len(prompts), batch), desc="scores"):
        part = prompts[first : first + batch]
        images = torch.stack([read(picture(folder, first + j)) for j in range(len(part))]).to(clip.device)
        scores += clip.score(clip.features(images), part).tolist()
    return scores


def read(path):
    """A picture file -> (3, H, W) in [-1, 1]."""
    array = np.array(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def imported(paths, num):
    """{column: mean} from the JSON files of --scores. Raises UserError for an unreadable one, or for other pictures."""
    found = {}
    for path in paths:
        try:
            read_scores = json.loads(Path(path).read_text())
            scores = {k: v if isinstance(v, list) else [v] for k, v in read_scores.items()}
            means = {k: sum(map(float, v)) / len(v) for k, v in scores.items()}
        except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as e:
            expected = '{"HPSv2": one score per picture, or their mean}'
            raise UserError(f"--scores {path}: {e} (expected {expected})") from None
        for name, values in scores.items():
            if name not in COLUMNS:
                raise UserError(f"--scores {path}: unknown column {name} (one of {', '.join(COLUMNS)})")
            if len(values) not in (1, num):
                raise UserError(f"--scores {path}: {len(values)} scores of {name} for {num} pictures")
        found |= means
    return found


def table(name, nfe, means, cost=""):
    """The paper's rows in Markdown, and below them ours. means: {column: mean}."""
    rows = PAPER | {f"**{name}**": (nfe, *(means.get(c) for c in COLUMNS), cost)}
    lines = [
        "| COCO-10k, as the paper prints it | NFE | " + " | ".join(COLUMNS) + " | cost |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    for title, row in rows.items():
        lines.append(f"| {title} | " + " | ".join(map(cell, row)) + " |")
    return "\n".join(lines)


def cell(value):
    """A value of the table as text."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
