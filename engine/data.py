"""Captioned images: the toy world's scenes, a folder of photographs, or WebDataset shards.

A source is endless: source[sample number] is (image (3, H, W) in [-1, 1], prompt, sizes (6,)). So a sample meets
the same noise on any number of ranks, and a resumed run needs no stored position. The sizes are SDXL's conditions: the
image's original height and width, its crop's top and left after resizing, and the crop's height and width.
`prompts(n)` are fixed ones for previews; `every_prompt()`, which the toy lacks, are all of them. `held_out(start, n)`
gives images and prompts that training never sees, and `judge(images, prompts)` checks pictures exactly: the toy has
both, in other sources they are None.

How pictures are read is in engine/decode.py, text in engine/text.py, folders in engine/layouts.py, shards in
engine/shards.py.
"""

import io
import os
import pickle
import signal
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine import layouts, shards, text
from engine.decode import Unreadable, Unusable, read, square_sizes
from engine.errors import UserError
from toy import world


def source(name, resolution, seed=0, prompts=""):
    """The source `name`: "toy", a folder, or a pattern of .tar files.

    prompts: a text file whose lines replace its prompts. Raises UserError for data that cannot be read.
    """
    if str(name) == "toy":
        if resolution != world.SIZE:
            raise UserError(f"the toy world's images are {world.SIZE} pixels wide, --resolution says {resolution}")
        found = Toy(seed)
    else:
        layout = layouts.find(name)
        kind = Shards if layout.shards else ImageFolder
        found = kind(layout, resolution, seed)
    return Prompted(found, prompts, seed) if prompts else found


@lru_cache(maxsize=4)
def order_of(n, seed, epoch):
    """The permutation of n samples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def candidates(i, n, seed):
    """The rows that can serve as sample i of n shuffled ones: its own, then those after it -> epoch, row numbers."""
    epoch, place = divmod(i, n)
    order = order_of(n, seed, epoch)
    return epoch, (order[(place + offset) % n] for offset in range(n))


def one_of(caption, seed, epoch, row):
    """The caption of a row in an epoch: of several, one drawn by (seed, epoch, row)."""
    if isinstance(caption, str):
        return caption
    return caption[np.random.default_rng([seed, epoch, row]).integers(len(caption))]


def first_of(caption):
    """The caption, or the first of several."""
    return caption if isinstance(caption, str) else caption[0]


class PassedOver(dict):
    """Pictures that are passed over, {name: why}: named and counted as they come.

    More than 5 % broken ones, in one process, raise UserError. A shape, or a lack of memory, does not end a run.
    """

    def __init__(self, where, total):
        super().__init__()
        self.where = where
        self.total = total
        self.broken = 0

    def add(self, name, error):
        """error: an Unusable of engine/decode.py."""
        self[name] = str(error)
        self.broken += isinstance(error, Unreadable)
        text.tell(f"skipped image {name} ({len(self)} so far): {error}")
        if self.broken > text.MOST_BAD * self.total:
            raise UserError(
                f"{self.broken} of {self.total} images in {self.where} cannot be read (more than 5 %): {self}"
            )

    def none_left(self):
        """The UserError for a source of which no picture can be used."""
        return UserError(f"none of the {self.total} images in {self.where} can be used: {self}")

    def __str__(self):
        first = [f"{name} ({why})" for name, why in list(self.items())[:3]]
        return ", ".join(first) + (" ..." if len(self) > 3 else "")


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
    """A folder in one of the layouts of engine/layouts.py.

    (seed, epoch) shuffles an epoch. Images are resized by their short side and cropped at the centre. One that cannot
    be used is replaced by the next, and its name added to `bad`. Raises UserError above 5 % of broken ones.
    """

    judge = held_out = None
    latents = None  # a latent cache (engine/latent_cache.py): name -> latent and sizes, in place of pictures

    def __init__(self, layout, resolution, seed):
        self.path = layout.root
        self.resolution = resolution
        self.seed = seed
        self.rows = self._index(layout)  # (file name, caption or several)
        self.bad = PassedOver(self.path, len(self.rows))
        for name in self._missing():
            self.bad.add(name, Unreadable("no such file"))

    def _index(self, layout):
        return layouts.captions(layout)

    def _missing(self):
        return [name for name, _ in self.rows if not os.path.isfile(self.path / name)]

    def _open(self, name):
        return open(self.path / name, "rb")

    def __getitem__(self, i):
        epoch, rows = candidates(i, len(self.rows), self.seed)
        for row in rows:
            name, caption = self.rows[row]
            if name in self.bad:
                continue
            try:
                picture, sizes = self.load(name)
                return picture, one_of(caption, self.seed, epoch, row), sizes
            except Unusable as e:
                self.bad.add(name, e)
        raise self.bad.none_left()

    def load(self, name):
        """-> a picture (3, H, W), or its cached latent, and its sizes (6,). Raises Unusable."""
        if self.latents:
            return self.latents(name)
        try:
            file = self._open(name)
        except Exception as e:  # files of remote shards: every protocol has errors of its own
            raise Unreadable(str(e) or type(e).__name__) from None
        with file:
            return read(file, self.resolution)

    def prompts(self, n):
        return [first_of(self.rows[i % len(self.rows)][1]) for i in range(n)]

    def every_prompt(self):
        return [one for _, caption in self.rows for one in ([caption] if isinstance(caption, str) else caption)]


class Shards(ImageFolder):
    """WebDataset shards: a pattern of .tar files, such as "shards/{000..127}.tar", "shards/*.tar" or a URL for fsspec.

    The shards are read once, for names, captions and places. Then every image is one seek away, so shuffling is global
    and resuming exact on any number of ranks.
    """

    def _index(self, layout):
        rows, self.places = shards.index(layout.shards, self.path)
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


class Prompted:
    """Another source's images with prompts from a text file, one per line, shuffled every epoch.

    The prompts need not fit the images: Pixel-GAN's D sees no prompt.
    """

    def __init__(self, source, path, seed):
        self.source = source
        self.seed = seed
        self.lines = text.prompts(path)
        self.held_out = source.held_out
        self.judge = source.judge

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self.lines))
        picture, _, sizes = self.source[i]
        prompt = self.lines[order_of(len(self.lines), self.seed, epoch)[place]]
        return picture, prompt, square_sizes(int(sizes[-1]))

    def prompts(self, n):
        return [self.lines[i % len(self.lines)] for i in range(n)]

    def every_prompt(self):
        return self.lines


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
