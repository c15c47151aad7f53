"""Picture files -> tensors: what a viewer shows, resized by its short side and cropped at the centre.

What a viewer shows: the picture turned as its EXIF orientation says, transparent parts on white, the first frame of an
animation, and greys of more than 8 bits scaled to 8 (see `in_8_bits`). Colour profiles are not applied.
"""

import numpy as np
import torch
from PIL import Image

MOST_UNEVEN = 8  # the largest ratio of a picture's sides
ORIENTATION = 0x0112  # the EXIF tag, and the turn that undoes each of its values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """A picture that is passed over: for its shape, or because there is no memory for it. Its text says why."""


class Unreadable(Unusable):
    """A picture that is broken: more than 5 % of them end the run."""


def read(file, side):
    """A path or an open file -> the picture (3, side, side) in [-1, 1], and its sizes (6,).

    Raises Unusable for extreme shapes and where memory does not suffice, Unreadable for whatever else goes wrong.
    """
    try:
        with Image.open(file) as image:
            check_shape(image.size, side)
            picture = as_seen(image)
            return pixels(picture, side), sizes_of(picture, side)
    except Unusable:
        raise
    except MemoryError:
        raise Unusable("there is not enough memory to read it") from None
    except Exception as e:  # Pillow raises all kinds: struct.error, SyntaxError, IndexError, DecompressionBombError ...
        raise Unreadable(f"{e}" or type(e).__name__) from None


def check_shape(size, side):
    """Raises Unusable for a picture whose short side is under 1/8 of `side`, or under 1/8 of its long side."""
    width, height = size
    if min(size) * 8 < side:
        raise Unusable(f"{width} x {height} pixels: its short side is under 1/8 of {side}, the resolution")
    if max(size) > MOST_UNEVEN * min(size):
        raise Unusable(f"{width} x {height} pixels: one side is more than {MOST_UNEVEN} times the other")


def as_seen(image):
    """A picture file opened by PIL -> an RGB picture as a viewer shows it."""
    image.load()  # first: Pillow turns TIFFs itself when it loads them
    turn = TURNS.get(orientation(image))
    if image.mode.startswith(("I", "F")):
        image = in_8_bits(image)
    elif image.has_transparency_data:
        image = on_white(image)
    image = image.convert("RGB")
    return image.transpose(turn) if turn is not None else image


def orientation(image):
    """The EXIF orientation, 1 to 8; 1 where there is none, or where the EXIF cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises all kinds here too; a viewer ignores broken EXIF
        return 1


def on_white(image):
    """A picture with transparency (RGBA, LA, a palette's, one transparent colour) over white, RGB."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def in_8_bits(image):
    """A grey picture of 16 or 32 bits or of floats -> grey in 8 bits.

    Black and white are 0 and 65535 for integers; for floats 0 and the first of 1, 255 and 65535 that holds all values.
    Where the values do not fit, negative ones too, the smallest is black and the largest white. NaN is black.
    """
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((w for w in whites if low >= 0 and high <= w), None)
    black = 0 if white else low
    white = white or max(high, low + 1e-6)
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    if isinstance(image.info.get("transparency"), int):  # a PNG's one transparent grey
        values[values == image.info["transparency"]] = white
    return Image.fromarray(((values - black) / (white - black) * 255 + 0.5).astype(np.uint8))


def pixels(picture, side):
    """An RGB picture -> (3, side, side) in [-1, 1]: resized by its short side, cropped at the centre.

    Only what is inside the crop is computed.
    """
    (width, height), left, top = crop(picture, side)
    x, y = picture.width / width, picture.height / height
    box = (left * x, top * y, min((left + side) * x, picture.width), min((top + side) * y, picture.height))
    array = np.array(picture.resize((side, side), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def crop(picture, side):
    """-> the size (width, height) to resize a picture to, and the left and the top of the square in its centre."""
    scale = side / min(picture.size)
    width, height = (max(side, round(s * scale)) for s in picture.size)
    return (width, height), (width - side) // 2, (height - side) // 2


def sizes_of(picture, side):
    """SDXL's conditions of a picture as `pixels` shows it: (height, width, top, left, side, side)."""
    _, left, top = crop(picture, side)
    return torch.tensor([picture.height, picture.width, top, left, side, side], dtype=torch.float32)


def square_sizes(side):
    """SDXL's size conditions of a square picture that was never cropped: (side, side, 0, 0, side, side)."""
    return torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
