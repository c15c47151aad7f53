"""Pictures drawn from prompts, as PIL images, and in a labelled grid."""

import textwrap

import torch
from PIL import Image, ImageDraw

from diffusion import backward_simulation, randn, sample_generators, sample_ode
from engine.models import at_once


@torch.no_grad()
def generate(denoiser, encoder, vae, prompts, steps, seed, first=0, batch=None, ode=False):
    """Prompts -> pictures (n, 3, H, W) in [-1, 1] on the CPU, `batch` (by default at_once) of them together.

    A picture depends on (seed, prompt, first + place in the list), not on the batch size. Few-step sampling re-noises
    between steps (diffusion.backward_simulation); ode=True is the multi-step teacher's sampler (diffusion.sample_ode).
    """
    side = encoder.size // vae.factor
    batch = batch or at_once(encoder.size)
    pictures = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        c = encoder.encode(part)
        generators = sample_generators(seed, 0, range(first + i, first + i + len(part)), "sample")
        z = randn(generators, torch.empty(len(part), vae.channels, side, side, device=encoder.device))
        if ode:
            x_0 = sample_ode(denoiser, z, c, steps)
        else:
            x_0 = backward_simulation(denoiser, z, c, denoiser.schedule.steps(steps), generators)
        pictures.append(vae.decode(x_0).clamp(-1, 1).cpu())
    return torch.cat(pictures)


def to_pil(image):
    """(3, H, W) in [-1, 1] -> a PIL image; out-of-range values are clipped."""
    array = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def save_grid(path, rows, row_labels, column_labels=()):
    """A labelled grid of pictures as one PNG.

    rows: a list of (n, 3, H, W) in [-1, 1]; row_labels: one per row; column_labels: one per column, or none.
    """
    cell = max(128, min(rows[0].shape[-1], 256))
    left = 12 + max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(label) for label in row_labels)
    wrapped = [textwrap.wrap(label, cell // 7) for label in column_labels]
    top = 12 * max(map(len, wrapped), default=0) + 4
    sheet = Image.new("RGB", (int(left) + rows[0].shape[0] * (cell + 4), top + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(wrapped):
        draw.text((left + j * (cell + 4), 2), "\n".join(lines), fill="black", spacing=1)
    for i, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        draw.text((6, top + i * (cell + 4) + cell // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            how = Image.Resampling.NEAREST if image.shape[-1] < cell else Image.Resampling.LANCZOS
            picture = to_pil(image).resize((cell, cell), how)
            sheet.paste(picture, (int(left) + j * (cell + 4), top + i * (cell + 4)))
    sheet.save(path)
