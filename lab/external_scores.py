"""Scores of saved pictures by packages that pin old dependencies.

This file runs in an environment of theirs, where nothing of ours is installed:

    python -m venv hps && hps/bin/pip install hpsv2 && hps/bin/python lab/external_scores.py hpsv2 DIR
    python -m venv ir && ir/bin/pip install image-reward && ir/bin/python lab/external_scores.py imagereward DIR
    git clone https://github.com/Kwai-Kolors/MPS
    python -m venv mps && mps/bin/pip install -r MPS/requirements.txt -e MPS
    mps/bin/python lab/external_scores.py mps DIR MPS/outputs/MPS_overall_checkpoint.pth

MPS' README links that checkpoint, a whole pickled model. DIR is evaluate.py's --images; the scores go to
DIR/hpsv2.json, DIR/imagereward.json and DIR/mps.json, for its --scores. No test runs these packages: their weights are
not part of this project.
"""

import functools
import json
import sys
from pathlib import Path


def hpsv2_scorer():
    import hpsv2
    import torch

    torch.load = functools.lru_cache(maxsize=1)(torch.load)  # the package reads its checkpoint again for every picture
    return "HPSv2", lambda path, prompt: float(hpsv2.score(str(path), prompt, hps_version="v2.1")[0])


def imagereward_scorer():
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0")
    return "ImgRwd", lambda path, prompt: float(model.score(prompt, str(path)))


def mps_scorer():
    """MPS of one picture: its model compares two, so the picture is given twice.

    The condition is that of overall preference, from its README.
    """
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor

    clip = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessor.from_pretrained(clip)
    model = torch.load(sys.argv[3], map_location=device, weights_only=False).eval()
    overall = """light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure,
        instance, texture, quantity, attributes, position, number, location, word, things."""

    def tokens(text):
        length = tokenizer.model_max_length
        kept = tokenizer(text, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return kept.input_ids.to(device)

    @torch.no_grad()
    def score(path, prompt):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"].to(device)
        text, picture, _ = model(tokens(prompt), torch.cat([pixels, pixels]), tokens(" ".join(overall.split())))
        return float(model.logit_scale.exp() * torch.cosine_similarity(text.float(), picture.float()).mean())

    return "MPS", score


def main():
    scorers = {"hpsv2": hpsv2_scorer, "imagereward": imagereward_scorer, "mps": mps_scorer}
    kind, folder, *more = [*sys.argv[1:], "", ""][:4]
    files = [path for path in (Path(folder, "settings.json"), *more) if path]
    complete = len(files) == (2 if kind == "mps" else 1) and all(Path(path).is_file() for path in files)
    if kind not in scorers or not complete:
        usage = f"usage: external_scores.py {'|'.join(scorers)} DIR [the checkpoint of mps]"
        sys.exit(f"{usage}, with DIR the --images folder of evaluate.py")
    folder = Path(folder)
    settings = json.loads((folder / "settings.json").read_text())
    prompts = settings["prompts"]
    names = settings.get("files") or [f"{i:05d}.png" for i in range(len(prompts))]
    column, score = scorers[kind]()
    scores = []
    for i, prompt in enumerate(prompts):
        scores.append(score(folder / names[i], prompt))
        if i % 100 == 0:
            print(f"{i} of {len(prompts)}", flush=True)
    out = folder / f"{kind}.json"
    out.write_text(json.dumps({column: scores}) + "\n")
    print(f"{column}: mean {sum(scores) / len(scores):.4f} of {len(scores)} pictures, in {out}")


if __name__ == "__main__":
    main()
