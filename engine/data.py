"""Captioned images: the toy world's scenes, a folder of photographs with a metadata.jsonl, or WebDataset shards.

A source is endless: source[sample number] is (image (3, H, W) in [-1, 1], prompt, sizes (6,)). So a sample meets
the same noise on any number of ranks, and a resumed run needs no stored position. The sizes are SDXL's conditions: the
image's original height and width, its crop's top and left after resizing, and the crop's height and width.
`prompts(n)` are fixed ones for previews. `held_out(start, n)` gives images and prompts that training never sees, and
`judge(images, prompts)` checks pictures exactly: the toy has both, in other sources they are None.
"""

import io
import json
import pickle
import re
import signal
import tarfile
from functools import lru_cache
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.errors import UserError
from engine.run_folder import metadata
from toy import world

# pillow's errors for a file that it cannot read
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, EOFError, ValueError, SyntaxError)


def source(name, resolution, seed=0, prompts=""):
    """The source `name`: "toy", a folder, or a pattern of .tar files.

    prompts: a text file whose lines replace its prompts. Raises UserError for data that cannot be read.
    """
    if str(name) == "toy":
        if resolution != world.SIZE:
            raise UserError(f"the toy world's images are {world.SIZE} pixels wide, --resolution says {resolution}")
        found = Toy(seed)
    else:
        found = (Shards if str(name).endswith(".tar") else ImageFolder)(name, resolution, seed)
    return Prompted(found, prompts, seed) if prompts else found


@lru_cache(maxsize=4)
def order_of(n, seed, epoch):
    """The permutation of n samples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class Toy:
    """Scenes of the toy world, drawn as they are needed."""

    judge = staticmethod(world.judge)

    def __init__(self, seed):
        self.first = seed * 10**7  # every seed has its own scenes

    def __getitem__(self, i):
        scene, caption = world.scene(self.first + i)
        return world.render(scene), caption, square_sizes(world.SIZE)

    def prompts(self, n):
        return [world.scene(i, "test")[1] for i in range(n)]

    def held_out(self, start, n):
        pairs = [world.scene(i, "test") for i in range(start, start + n)]
        return torch.stack([world.render(s) for s, _ in pairs]), [c for _, c in pairs]


class ImageFolder:
    """A folder in Hugging Face's ImageFolder layout: images, and metadata.jsonl with "file_name" and "text" per line.

    (seed, epoch) shuffles an epoch. Images are resized by their short side and cropped at the centre. An unreadable one
    is replaced by the next, and its name added to `bad`; more than 5 % of them, in one process, raise UserError.
    """

    judge = held_out = None
    latents = None  # a latent cache (engine/latent_cache.py): name -> latent and sizes, in place of pictures

    def __init__(self, path, resolution, seed):
        self.path = path
        self.resolution = resolution
        self.seed = seed
        self.bad = {}  # name -> why it cannot be read
        self.rows = self._index()  # (file name, caption)
        for name in self._missing():
            self.skip(name, "no such file")

    def _index(self):
        table = metadata(self.path)
        rows = []
        for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    rows.append((str(row["file_name"]), row["text"].strip()))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(f'{table}, line {number}: needs "file_name" and "text" (a caption)') from None
                if not rows[-1][1]:
                    raise UserError(f"{table}, line {number}: the caption of {rows[-1][0]} is empty")
        if not rows:
            raise UserError(f"{table} names no image")
        return rows

    def _missing(self):
        return [name for name, _ in self.rows if not Path(self.path, name).is_file()]

    def _open(self, name):
        return open(Path(self.path, name), "rb")

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.rows))
        order = order_of(len(self.rows), self.seed, epoch)
        for offset in range(len(self.rows)):
            name, text = self.rows[order[(place + offset) % len(self.rows)]]
            if name in self.bad:
                continue
            try:
                picture, sizes = self.load(name)
                return picture, text, sizes
            except UNREADABLE as e:
                self.skip(name, e)

    def load(self, name):
        """-> a picture (3, H, W), or its cached latent, and its sizes (6,). Raises one of UNREADABLE."""
        if self.latents:
            return self.latents(name)
        with self._open(name) as file, Image.open(file) as image:
            return pixels(image, self.resolution), sizes_of(image, self.resolution)

    def skip(self, name, why):
        self.bad[name] = str(why)
        print(f"skipped unreadable image {name} ({len(self.bad)} so far): {why}")
        if len(self.bad) > 0.05 * len(self.rows):
            names = ", ".join(list(self.bad)[:3])
            how_many = f"{len(self.bad)} of {len(self.rows)} images in {self.path}"
            raise UserError(f"{how_many} cannot be read (more than 5 %): {names} ...")

    def prompts(self, n):
        return [self.rows[i % len(self.rows)][1] for i in range(n)]


class Shards(ImageFolder):
    """WebDataset shards: a pattern of .tar files, such as "shards/{000..127}.tar", "shards/*.tar" or a URL for fsspec.

    A sample is the members with one name up to the first dot: an image (jpg, jpeg, png, webp) and its caption, .txt or
    .json ("text" or "caption"). The shards are read once, for names, captions and places. Then every image is one seek
    away, so shuffling is global and resuming exact on any number of ranks. Samples without a caption and the ends of
    torn shards are reported and left out.
    """

    def _index(self):
        self.places = {}  # name -> (shard, first byte, length)
        rows = []
        try:
            shards = fsspec.open_files(list(braces(str(self.path))))
        except (OSError, ValueError, ImportError) as e:
            raise UserError(f"cannot find the shards {self.path}: {e}") from None
        if not shards:
            raise UserError(f"{self.path} matches no file")
        for shard in tqdm(shards, desc="shards", disable=len(shards) < 20):
            images, captions = members(shard)
            for key, (name, *place) in images.items():
                if captions.get(key):
                    rows.append((f"{shard.full_name}/{name}", captions[key]))
                    self.places[rows[-1][0]] = (shard, *place)
            bare = [name for key, (name, *_) in images.items() if not captions.get(key)]
            if bare:
                print(f"{len(bare)} images of {shard.full_name} have no caption and are left out, the first: {bare[0]}")
        if not rows:
            raise UserError(f"{self.path} holds no image with a caption (.txt or .json of the same name)")
        return rows

    def _missing(self):
        return []

    def _open(self, name):
        shard, first, length = self.places[name]
        # a copy, opened in this process: connections do not survive the fork to a loader
        shard = pickle.loads(pickle.dumps(shard))
        with shard as file:
            file.seek(first)
            return io.BytesIO(file.read(length))


def members(shard):
    """A shard's images {key: (name, first byte, length)} and captions {key: text}.

    A torn shard is reported, and read up to where it is torn. Raises UserError where no image of it can be read.
    """
    images = {}
    captions = {}
    try:
        with shard as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key = folder + slash + stem
                if kind.lower() in ("jpg", "jpeg", "png", "webp"):
                    images[key] = (member.name, member.offset_data, member.size)
                elif kind.lower() in ("txt", "json"):
                    captions[key] = captions.get(key) or _caption(tar.extractfile(member).read(), kind.lower())
            check_end(file, tar.offset)
    except (tarfile.TarError, OSError) as e:
        if not images:
            raise UserError(f"cannot read the shard {shard.full_name}: {e}") from None
        print(f"shard {shard.full_name} is torn ({e}): what follows {list(images.values())[-1][0]} is left out")
    return images, captions


def check_end(file, offset):
    """Raises tarfile.ReadError where tarfile took a broken header for the end, which is at least two zero blocks."""
    if file.seek(0, io.SEEK_END) < offset + 1024:
        raise tarfile.ReadError("it has no end")
    file.seek(offset)
    if any(any(part) for part in iter(lambda: file.read(1 << 20), b"")):
        raise tarfile.ReadError(f"no header at byte {offset}")


def braces(pattern):
    """Brace patterns, as in shells and WebDataset: "a{00..11}b", "a{x,y}b" -> the names, in order."""
    m = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    if not m:
        return [pattern]
    low, high, words = m.groups()
    if low is None:
        options = words.split(",")
    else:
        options = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [name for option in options for name in braces(pattern[: m.start()] + option + pattern[m.end() :])]


def _caption(content, kind):
    """The caption in a member: the whole text, or a JSON object's "text" or "caption"; empty where there is none."""
    text = content.decode("utf-8", "replace")
    if kind == "json":
        try:
            row = json.loads(text)
            text = row.get("text") or row.get("caption") or ""
        except (ValueError, AttributeError):
            return ""
    return str(text).strip()


class Prompted:
    """Another source's images with prompts from a text file, one per line, shuffled every epoch.

    The prompts need not fit the images: D sees no prompt.
    """

    def __init__(self, source, path, seed):
        if not Path(path).is_file():
            raise UserError(f"--prompts {path}: no such file")
        self.source = source
        self.seed = seed
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not self.lines:
            raise UserError(f"--prompts {path} holds no prompt (one per line)")
        self.held_out = source.held_out
        self.judge = source.judge

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.lines))
        picture, _, sizes = self.source[i]
        prompt = self.lines[order_of(len(self.lines), self.seed, epoch)[place]]
        return picture, prompt, square_sizes(int(sizes[-1]))

    def prompts(self, n):
        return [self.lines[i % len(self.lines)] for i in range(n)]


def pixels(image, side):
    """A PIL image -> (3, side, side) in [-1, 1]: resized by its short side, cropped at the centre."""
    resized, left, top = crop(image, side)
    image = image.convert("RGB").resize(resized, Image.Resampling.LANCZOS)
    array = np.array(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def crop(image, side):
    """-> the size (width, height) to resize an image to, and the left and the top of the square in its centre."""
    scale = side / min(image.size)
    width, height = (max(side, round(s * scale)) for s in image.size)
    return (width, height), (width - side) // 2, (height - side) // 2


def sizes_of(image, side):
    """SDXL's conditions of a PIL image as `pixels` shows it: (height, width, top, left, side, side)."""
    _, left, top = crop(image, side)
    return torch.tensor([image.height, image.width, top, left, side, side], dtype=torch.float32)


def square_sizes(side):
    """SDXL's size conditions of a square picture that was never cropped: (side, side, 0, 0, side, side)."""
    return torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)


class _Indexed(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        return *self.source[i], i


def batches(source, indices, workers=0):
    """Batches in the order of `indices`, a list of lists of global sample numbers.

    Yields images (B, 3, H, W), prompts, sizes (B, 6), indices (B,).
    """
    how = {"batch_sampler": indices, "num_workers": workers, "worker_init_fn": ignore_first_sigterm}
    return iter(DataLoader(_Indexed(source), **how))


def ignore_first_sigterm(worker):
    """torchrun and Slurm send SIGTERM to loader processes too, but the run's last loop needs them."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
