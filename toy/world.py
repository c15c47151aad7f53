"""The toy world: 64x64 scenes whose captions can be CHECKED, not estimated.

A scene is a background (colour, texture) with one object in one of four corners. The object has a shape, colour, size,
fill and a place in its corner. The caption states some of these facts. Those that it leaves open (textures, most sizes
and fills, the exact place) make few-step sampling hard; those that it states can be read back from the pixels, exactly.

    scene(i, split)     the i-th scene of "train" or "test", and its caption; no caption and no scene is in both
    render(scene)       its image, (3, 64, 64) in [-1, 1];  labels(scene) its masks, (64, 64)
    detect(images)      the scene of each image, by comparing each cell with every object it could hold
    judge(images, prompts)   which of the stated facts are true
"""

import itertools
import re
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

SIZE, CELL = 64, 32
COLORS = {
    "red": (0.85, 0.13, 0.15),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.62, 0.18, 0.75),
}
BACKGROUNDS = {
    "black": (0.10, 0.10, 0.10),
    "gray": (0.50, 0.50, 0.50),
    "tan": (0.76, 0.66, 0.50),
    "navy": (0.10, 0.12, 0.34),
}
SHAPES = ("circle", "cross", "triangle", "ring")
FILLS = ("plain", "striped")
TEXTURES = ("plain", "checkered")
SIZES = {"small": 8, "large": 12}  # radius, pixels
ROWS = ("top", "bottom")  # of corners
COLUMNS = ("left", "right")
SECOND = (0.97, 0.97, 0.97)  # the colour of stripes
CHECKER = 0.06  # checkered backgrounds: squares of 8 pixels, lighter and darker by this much
PLACED = (-2, 2)  # offsets of an object's centre from its cell's, in x and in y: 4 pixels apart, one latent pixel
REACH = 3  # `detect` searches this many pixels around a cell's centre
# above this squared distance (summed over RGB, mean over pixels) from its best match, a cell holds no valid object
MALFORMED = 0.05


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    fill: str
    cell: int  # 0..3, reading order
    dx: int = 0
    dy: int = 0

    @property
    def row(self):
        return ROWS[self.cell // 2]

    @property
    def column(self):
        return COLUMNS[self.cell % 2]


@dataclass(frozen=True)
class Scene:
    background: str
    texture: str
    objects: tuple  # of Object, in reading order: one in a scene of the world, any number in a generated picture

    def key(self):
        """The scene in words, without the place inside the cell: it decides the split."""
        objects = [f"{o.size} {o.fill} {o.color} {o.shape} {o.cell}" for o in self.objects]
        return " ".join([self.background, self.texture, *objects])


# ---------------------------------------------------------------------------------------------- drawing


@cache
def stencil(shape, size, fill, dx=0, dy=0):
    """Coverage in [0, 1] of an object's first and second colour, (2, CELL, CELL) float (4x4 supersampled)."""
    s = 4
    grid = (np.arange(CELL * s) + 0.5) / s - CELL / 2
    x, y = np.meshgrid(grid - dx, grid - dy)
    r = SIZES[size]
    inside = {
        "circle": x**2 + y**2 < r**2,
        "cross": (np.maximum(abs(x), abs(y)) < r) & (np.minimum(abs(x), abs(y)) < 0.38 * r),
        "triangle": (y < 0.8 * r) & (y > -r + 2 * abs(x) * 0.9),
        "ring": (x**2 + y**2 < r**2) & (x**2 + y**2 > (0.5 * r) ** 2),
    }[shape]
    second = {
        "plain": np.zeros_like(inside),
        "striped": np.floor((y + 1.5) / 3) % 2 == 1,
    }[fill]
    masks = np.stack([inside & ~second, inside & second]).astype(np.float32)
    return masks.reshape(2, CELL, s, CELL, s).mean((2, 4))


def background(color, texture):
    """(3, SIZE, SIZE) in [0, 1]."""
    image = np.broadcast_to(np.array(BACKGROUNDS[color], np.float32)[:, None, None], (3, SIZE, SIZE))
    squares = (np.add.outer(np.arange(SIZE) // 8, np.arange(SIZE) // 8) % 2 * 2 - 1).astype(np.float32)
    return image + CHECKER * squares * (texture == "checkered")


def _cell(n):
    row, col = divmod(n, 2)
    return slice(row * CELL, (row + 1) * CELL), slice(col * CELL, (col + 1) * CELL)


def render(scene):
    """The scene's picture: float tensor (3, SIZE, SIZE) in [-1, 1]."""
    image = np.array(background(scene.background, scene.texture))
    for o in scene.objects:
        first, second = stencil(o.shape, o.size, o.fill, o.dx, o.dy)
        region = image[(slice(None), *_cell(o.cell))]
        color, stripe = (np.array(rgb, np.float32)[:, None, None] for rgb in (COLORS[o.color], SECOND))
        region *= 1 - first - second
        region += first * color + second * stripe
    return torch.from_numpy(image * 2 - 1)


def labels(scene):
    """The scene's masks: int64 tensor (SIZE, SIZE).

    0: background; 1 + 2 * shape: an object's first colour; 2 + 2 * shape: its second.
    """
    out = np.zeros((SIZE, SIZE), np.int64)
    for o in scene.objects:
        first, second = stencil(o.shape, o.size, o.fill, o.dx, o.dy)
        region = out[_cell(o.cell)]
        region[first >= 0.5] = 1 + 2 * SHAPES.index(o.shape)
        region[second >= 0.5] = 2 + 2 * SHAPES.index(o.shape)
    return torch.from_numpy(out)


# --------------------------------------------------------------------------------------------- captions


SPLITS = {"train": 1, "test": 2}  # split -> its number in the seed
# how often a caption states a fact; it always states the shape
STATED = {"size": 0.25, "fill": 0.25, "color": 0.9, "place": 0.9, "background": 0.4}


def random_scene(rng):
    pick = lambda options: list(options)[rng.integers(len(options))]  # noqa: E731
    one = Object(pick(SHAPES), pick(COLORS), pick(SIZES), pick(FILLS), pick(range(4)), pick(PLACED), pick(PLACED))
    return Scene(pick(BACKGROUNDS), pick(TEXTURES), (one,))


def caption(scene, rng):
    """The object's shape, and random further facts.

    With all of them: "a large striped red circle at the top left on a gray background".
    """
    (o,) = scene.objects
    words = ["a", *(getattr(o, kind) for kind in ("size", "fill", "color") if rng.random() < STATED[kind]), o.shape]
    words += ["at the", o.row, o.column] * (rng.random() < STATED["place"])
    words += ["on a", scene.background, "background"] * (rng.random() < STATED["background"])
    return " ".join(words)


def _held_out(text):
    return zlib.crc32(text.encode()) % 5 == 0


def crowd(index):
    """The index-th scene with objects in two to four corners, without a caption: for the VAE and SAM's encoder."""
    rng = np.random.default_rng([0, index])
    pick = lambda options: list(options)[rng.integers(len(options))]  # noqa: E731
    cells = sorted(rng.choice(4, rng.integers(2, 5), replace=False).tolist())
    objects = tuple(
        Object(pick(SHAPES), pick(COLORS), pick(SIZES), pick(FILLS), c, pick(PLACED), pick(PLACED)) for c in cells
    )
    return Scene(pick(BACKGROUNDS), pick(TEXTURES), objects)


def scene(index, split="train"):
    """-> (Scene, caption), a pure function of (index, split). No key or caption of a test scene occurs in train."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    for attempt in itertools.count():
        rng = np.random.default_rng([SPLITS[split], index, attempt])
        s = random_scene(rng)
        words = caption(s, rng)
        if {_held_out(s.key()), _held_out(words)} == {split == "test"}:
            return s, words


# ---------------------------------------------------------------------------------------------- reading


@cache
def _templates():
    """Every object a cell can hold, without its colour -> N names, templates (N, 5 * CELL * CELL).

    A template is the coverages m, n of the object's first and second colour as (m, n, m^2, n^2, m n).
    """
    span = range(-REACH, REACH + 1)
    names = list(itertools.product(SHAPES, SIZES, FILLS, span, span))
    m, n = torch.from_numpy(np.stack([stencil(*name) for name in names])).flatten(2).unbind(1)
    return names, torch.cat([m, n, m * m, n * n, m * n], 1)


@torch.no_grad()
def detect(images):
    """Read scenes back from pixels (B, 3, SIZE, SIZE) in [-1, 1] -> list of B Scenes.

    Analysis by synthesis: for each cell and all shapes, sizes, fills, places and colours, the squared distance between
    the cell and that object drawn on the picture's background. The smallest wins; the bare background takes part.
    A cell that matches nothing (MALFORMED) gets an object of shape "malformed", which satisfies no caption.

    Drawn pixel = ground + m (first - ground) + n (second - ground). With d = pixel - ground and p, q the brackets,
    |d - m p - n q|^2 = |d|^2 - 2 m d.p - 2 n d.q + m^2 |p|^2 + n^2 |q|^2 + 2 m n p.q: one product with _templates().
    """
    images = (images.float().cpu() + 1) / 2
    grounds = list(itertools.product(BACKGROUNDS, TEXTURES))
    drawn = torch.from_numpy(np.stack([background(*g) for g in grounds]))
    # An object hides the ground whatever the guess: cap the distance of a pixel.
    best_ground = (images[:, None] - drawn).square().sum(2).clamp(max=0.03).sum((2, 3)).argmin(1)  # (B,)
    names, masks = _templates()
    colors = torch.tensor(list(COLORS.values()))[:, :, None]  # (5, 3, 1)
    found = [[] for _ in images]
    for cell in range(4):
        rows, cols = _cell(cell)
        ground = drawn[best_ground][:, :, rows, cols].flatten(2)  # (B, 3, n)
        d = images[:, :, rows, cols].flatten(2) - ground
        q = torch.tensor(SECOND)[:, None] - ground
        terms = []
        for color in colors:
            p = color - ground
            products = [-2 * d * p, -2 * d * q, p * p, q * q, 2 * p * q]
            terms.append(torch.cat([product.sum(1) for product in products], 1))
        gains = torch.stack(terms, 1) @ masks.T  # (B, 5, N)
        best, where = gains.flatten(1).min(1)
        empty = best >= 0
        residual = (d.square().sum((1, 2)) + torch.where(empty, 0.0, best)) / CELL**2
        for i in range(len(images)):
            if residual[i] > MALFORMED:
                found[i].append(Object("malformed", "", "", "", cell))
            elif not empty[i]:
                color = list(COLORS)[where[i] // len(names)]
                shape, size, fill, dx, dy = names[where[i] % len(names)]
                found[i].append(Object(shape, color, size, fill, cell, dx, dy))
    return [Scene(*grounds[g], tuple(f)) for g, f in zip(best_ground.tolist(), found)]


def parse(text):
    """A caption of this world -> its facts {attribute: value}, such as {"color": "red", "shape": "circle"}.

    Raises ValueError for text outside the world's grammar.
    """
    said = text.strip().lower()
    facts = {}
    ground = re.search(r" on an? (\w+) background$", said)
    if ground:
        if ground[1] not in BACKGROUNDS:
            raise ValueError(f"not a background of the toy world: {ground[1]!r} in {text!r}")
        facts["background"] = ground[1]
        said = said[: ground.start()]
    corner = re.search(rf" at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})$", said)
    if corner:
        facts["row"], facts["column"] = corner.groups()
        said = said[: corner.start()]
    article, *words = said.split() or [""]
    kinds = {"shape": SHAPES, "color": COLORS, "size": SIZES, "fill": FILLS}
    for word in words:
        kind = next((k for k, values in kinds.items() if word in values), None)
        if kind is None or kind in facts:
            raise ValueError(f"not in the toy world's grammar: {word!r} in {text!r}")
        facts[kind] = word
    if article not in ("a", "an") or "shape" not in facts:
        raise ValueError(f"not in the toy world's grammar: {text!r}")
    return facts


def check(found, text):
    """Which facts of `text` are true of the Scene `found` -> {attribute: bool}; "count": whether it has one object.

    Of several objects, the one with the most true facts counts.
    """
    stated = parse(text)
    color = stated.pop("background", None)
    facts = [{kind: getattr(o, kind, None) == value for kind, value in stated.items()} for o in found.objects or [None]]
    true = {"count": len(found.objects) == 1}
    true.update(max(facts, key=lambda f: sum(f.values())))
    if color is not None:
        true["background"] = found.background == color
    return true


def judge(images, prompts):
    """Check pictures against their prompts -> (whole, attributes).

    images: (B, 3, SIZE, SIZE) in [-1, 1]; prompts: B captions of this world. Raises ValueError for other prompts.
    whole: B bools, whether every stated fact is true; attributes: attribute -> one bool per prompt that states it.
    """
    whole = []
    attributes = {}
    for found, text in zip(detect(images), prompts, strict=True):
        facts = check(found, text)
        whole.append(all(facts.values()))
        for kind, true in facts.items():
            attributes.setdefault(kind, []).append(true)
    return whole, attributes
