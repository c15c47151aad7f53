"""How fast pictures come: images a second of the data loader alone, folder against WebDataset shards.

python -m lab.loader --resolution 1024 --workers 2                 on made-up photographs, 1536 x 1152 JPEG
python -m lab.loader --data "shards/{000..127}.tar" --workers 8    on your own
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from engine import data
from engine.flags import at_least


def make(folder, count=96):
    """`count` smooth coloured JPEGs, as a folder with metadata.jsonl and as two shards -> {name: what --data takes}."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(2):
        with tarfile.open(folder / f"{n}.tar", "w") as tar:
            for i in range(count // 2):
                small = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
                out = io.BytesIO()
                name = f"{n}-{i:03d}"
                small.resize((1536, 1152), Image.Resampling.BICUBIC).save(out, "jpeg", quality=90)
                (folder / f"{name}.jpg").write_bytes(out.getvalue())
                rows.append({"file_name": f"{name}.jpg", "text": "a picture"})
                for kind, content in (("jpg", out.getvalue()), ("txt", b"a picture")):
                    info = tarfile.TarInfo(f"{name}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"folder": folder, "shards": f"{folder}/{{0..1}}.tar"}


def speed(name, resolution, workers, images, batch=8):
    """Images a second, the first batch (workers start) left out."""
    source = data.source(name, resolution)
    batches = data.batches(source, [range(i, i + batch) for i in range(0, images + batch, batch)], workers)
    next(batches)
    began = time.time()
    for _ in batches:
        pass
    return images / (time.time() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="what train.py's --data takes; default: made-up photographs")
    parser.add_argument("--resolution", type=at_least(1), default=1024)
    parser.add_argument("--workers", type=at_least(0), default=2)
    parser.add_argument("--images", type=at_least(1), default=192)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {args.data: args.data} if args.data else make(Path(folder))
        for name, where in sources.items():
            rate = speed(where, args.resolution, args.workers, args.images)
            print(f"{name}: {rate:.1f} images/s, {args.workers} workers, {args.resolution} pixels")


if __name__ == "__main__":
    main()
