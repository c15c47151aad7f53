"""Scores of saved pictures by packages that pin old dependencies: run this file in an environment of theirs, where nothing of ours is installed.

    python -m venv hps && hps/bin/pip install hpsv2 && hps/bin/python lab/external_scores.py hpsv2 DIR
    python -m venv ir && ir/bin/pip install image-reward && ir/bin/python lab/external_scores.py imagereward DIR

DIR is evaluate.py's --images; the scores go to DIR/hpsv2.json, DIR/imagereward.json, for its --scores. MPS has no package: score DIR
with its repository's code, and write {"MPS": [one score per picture]} yourself.
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


def main():
    scorers = {"hpsv2": hpsv2_scorer, "imagereward": imagereward_scorer}
    if len(sys.argv) != 3 or sys.argv[1] not in scorers or not Path(sys.argv[2], "settings.json").is_file():
        sys.exit(f"usage: external_scores.py {'|'.join(scorers)} DIR, with DIR the --images folder of evaluate.py")
    folder = Path(sys.argv[2])
    prompts = json.loads((folder / "settings.json").read_text())["prompts"]
    column, score = scorers[sys.argv[1]]()
    scores = []
    for i, prompt in enumerate(prompts):
        scores.append(score(folder / f"{i:05d}.png", prompt))
        if i % 100 == 0:
            print(f"{i} of {len(prompts)}", flush=True)
    out = folder / f"{sys.argv[1]}.json"
    out.write_text(json.dumps({column: scores}) + "\n")
    print(f"{column}: mean {sum(scores) / len(scores):.4f} of {len(scores)} pictures, in {out}")


if __name__ == "__main__":
    main()
