"""Pictures drawn from prompts, as tensors, as files, and in a labelled grid."""

import textwrap
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusion import backward_simulation, randn, sample_generators, sample_ode
from engine import picture_folder
from engine.errors import UserError
from engine.folders import first_line
from engine.models import at_once


@torch.no_grad()
def generate(denoiser, encoder, vae, prompts, steps, seed, first=0, batch=None, ode=False, size=None, bar=""):
    """Prompts -> pictures (n, 3, H, W) in [-1, 1] on the CPU, `batch` (by default at_once) of them together.

    A picture depends on (seed, prompt, first + place in the list), not on the batch size. Few-step sampling re-noises
    between steps (diffusion.backward_simulation); ode=True is the multi-step teacher's sampler (diffusion.sample_ode).
    size: (H, W), by default the encoder's square; SDXL is told so. bar: the title of a progress bar, by default none.
    """
    height, width = size or (encoder.size, encoder.size)
    shape = (vae.channels, height // vae.factor, width // vae.factor)
    batch = batch or at_once(height, width)
    pictures = []
    with tqdm(total=len(prompts), desc=bar, unit="picture", disable=not bar) as progress:
        for i in range(0, len(prompts), batch):
            part = prompts[i : i + batch]
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(part), 6)
            c = encoder.encode(part, sizes)
            generators = sample_generators(seed, 0, range(first + i, first + i + len(part)), "sample")
            z = randn(generators, torch.empty(len(part), *shape, device=encoder.device))
            if ode:
                x_0 = sample_ode(denoiser, z, c, steps)
            else:
                x_0 = backward_simulation(denoiser, z, c, denoiser.schedule.steps(steps), generators)
            pictures.append(vae.decode(x_0).clamp(-1, 1).cpu())
            progress.update(len(part))
    return torch.cat(pictures)


def draw(folder, denoiser, encoder, vae, prompts, steps, seed, batch=None, size=None, ode=False, **share):
    """Write the pictures of `prompts` that a picture folder lacks, each batch when it is drawn -> how many there were.

    Memory does not grow with the prompts. share: of `lacking_batches`. Raises UserError where a picture cannot be
    written.
    """
    batch = batch or at_once(*(size or (encoder.size, encoder.size)))
    name = share.get("name", picture_folder.numbered)
    todo = lacking_batches(folder, len(prompts), batch, **share)
    n = sum(map(len, todo.values()))
    how = {"batch": batch, "size": size, "ode": ode}
    bar = {"desc": "pictures", "unit": "picture", "disable": share.get("part", (0, 1))[0] > 0}
    with tqdm(total=len(prompts), initial=len(prompts) - n, **bar) as progress:
        for first, lacking in todo.items():
            # the whole batch, also for one picture: the same to the bit as in a call that was not stopped
            words = prompts[first : first + batch]
            images = generate(denoiser, encoder, vae, words, steps, seed, first=first, **how)
            for i in lacking:
                write_picture(picture_folder.picture(folder, i, name), images[i - first])
            progress.update(len(lacking))
    return n


def lacking_batches(folder, n, batch, name=picture_folder.numbered, lacking=None, part=(0, 1)):
    """{first picture of a batch: its pictures that are lacking}, those of one rank.

    name: that of a picture; lacking: which are, by default those that are not there; part: (rank, ranks).
    """
    lacking = picture_folder.missing(folder, n, name) if lacking is None else lacking
    rank, ranks = part
    mine = sorted({i // batch for i in lacking})[rank::ranks]
    todo = {b * batch: [] for b in mine}
    for i in lacking:
        if i // batch * batch in todo:
            todo[i // batch * batch].append(i)
    return todo


def write_picture(path, image):
    """Write a PNG aside and rename it: a kill leaves none torn. image: (3, H, W) in [-1, 1]. Raises UserError."""
    aside = path.with_suffix(".part")
    try:
        to_pil(image).save(aside, format="PNG")
        aside.rename(path)
    except OSError as e:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({first_line(e)}): make room; those before it are whole") from None


def read_picture(path, most=None):
    """A picture file -> (3, H, W) in [-1, 1], made smaller where it is wider than `most` pixels."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if most and image.width > most:
        image = image.resize((most, round(image.height * most / image.width)), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def device_of(name=None):
    """The torch device of --device, by default the GPU where there is one. Raises UserError for a missing one."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here, give cpu or another")
    return device


def out_of_memory(error):
    """The line for an error that is a failed allocation; other errors are raised again."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    return "out of memory: lower --batch-size or --size, or pass --dtype bf16"


def to_pil(image):
    """(3, H, W) in [-1, 1] -> a PIL image; out-of-range values are clipped."""
    array = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def in_steps(n):
    """A number of sampling steps as a label has it."""
    return f"{n} step" if n == 1 else f"{n} steps"


def save_grid(path, rows, row_labels, column_labels=()):
    """A labelled grid of pictures as one PNG.

    rows: a list of (n, 3, H, W) in [-1, 1]; row_labels: one per row; column_labels: one per column, or none.
    """
    cell = max(128, min(rows[0].shape[-1], 256))  # its width
    tall = round(cell * rows[0].shape[-2] / rows[0].shape[-1])
    left = 12 + max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(label) for label in row_labels)
    wrapped = [textwrap.wrap(label, cell // 7) for label in column_labels]
    top = 12 * max(map(len, wrapped), default=0) + 4
    sheet = Image.new("RGB", (int(left) + rows[0].shape[0] * (cell + 4), top + len(rows) * (tall + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(wrapped):
        draw.text((left + j * (cell + 4), 2), "\n".join(lines), fill="black", spacing=1)
    for i, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        draw.text((6, top + i * (tall + 4) + tall // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            how = Image.Resampling.NEAREST if image.shape[-1] < cell else Image.Resampling.LANCZOS
            picture = to_pil(image).resize((cell, tall), how)
            sheet.paste(picture, (int(left) + j * (cell + 4), top + i * (tall + 4)))
    sheet.save(path)
