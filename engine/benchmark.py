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

import torch
from tqdm import tqdm

from engine.coco import COLUMNS, PAPER
from engine.errors import UserError
from engine.picture_folder import picture
from engine.pictures import read_picture


def cosine_scores(clip, prompts, folder, batch=64):
    """metrics.Clip's score of each picture in folder with its prompt: a list."""
    scores = []
    for first in tqdm(range(0, len(prompts), batch), desc="scores"):
        part = prompts[first : first + batch]
        images = torch.stack([read_picture(picture(folder, first + j)) for j in range(len(part))]).to(clip.device)
        scores += clip.score(clip.features(images), part).tolist()
    return scores


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
