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

from engine.errors import UserError
from engine.picture_folder import picture
from engine.pictures import read_picture

COLUMNS = ("ImgRwd", "CLIP", "Pick", "HPSv2", "MPS")
PAPER = {  # Tables 1, 2, 3, 6, 7: COCO-10k; name: (NFE, *COLUMNS, cost = batch x iterations or GPU hours)
    "SDXL": (100, 0.7143, 0.3295, 0.2265, 0.2865, 11.87, ""),
    "DMD2-SDXL": (4, 0.8748, 0.3302, 0.2309, 0.2937, 12.41, "128 x 24k"),
    "Flash-DMD, TTUR1-1k": (4, 0.9509, 0.3292, 0.2322, 0.2968, 12.67, "64 x 1k"),
    "Flash-DMD, TTUR2-4k": (4, 0.9450, 0.3291, 0.2322, 0.2969, 12.65, "64 x 4k"),
    "Flash-DMD, TTUR2-8k": (4, 0.9740, 0.3298, 0.2327, 0.2981, 12.71, "64 x 8k"),
    "Flash-DMD, TTUR5-18k": (4, 0.9426, 0.3302, 0.2319, 0.2982, 12.63, "64 x 18k"),
    "Flash-DMD, stage 2": (4, 1.0035, 0.3285, 0.2346, 0.2930, 12.84, "12 H20 hours"),
    "Flash-DMD, 8 steps, TTUR2-3k": (8, 0.9159, 0.3281, 0.2319, 0.2981, 12.60, "48 x 3k"),
    "Flash-DMD, 8 steps, stage 2, 3k": (8, 1.0012, 0.3299, 0.2338, 0.2986, 12.75, "12 H20 hours"),
    "SD3-Medium": (28, 1.0173, 0.3301, 0.2273, 0.2933, 12.05, ""),
    "Flash-DMD on SD3, TTUR2-4k": (4, 1.0193, 0.3269, 0.2285, 0.2976, 12.43, "32 x 4k"),
}


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
