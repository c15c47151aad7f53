"""--cache-latents: the VAE's latents of a folder's or of shards' pictures, encoded once and kept in a folder.

    DIR/settings.json      data, model, resolution: what the latents are of
    DIR/1a2b3c4d....pt     of one picture, named by its name's SHA-1: latent (C, h, w) in fp16, sizes (6,)

For methods that look at latents alone; Pixel-GAN does with --gan-reals vae. A picture that changes under its name is not noticed.
"""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import barrier
from data import UNREADABLE
from models import UserError


def fill(source, vae, config, rank=0, ranks=1):
    """In place: `source` gives latents instead of pictures. What is missing of them is encoded first, a share on each rank.

    Raises UserError for a folder with latents of another kind.
    """
    source = getattr(source, "source", source)  # of a Prompted one
    folder, settings = Path(config.cache_latents), {k: str(getattr(config, k)) for k in ("data", "model", "resolution")}
    note = folder / "settings.json"
    if note.exists() and (found := json.loads(note.read_text())) != settings:
        raise UserError(f"{folder} holds latents of {found}: give another --cache-latents")
    if not note.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not a latent cache (it has no settings.json): give another --cache-latents")
    barrier()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2) + "\n")
    barrier()
    place = lambda name: folder / (hashlib.sha1(name.encode()).hexdigest() + ".pt")  # noqa: E731
    names, device = [name for name, _ in source.rows][rank::ranks], next(vae.parameters()).device
    for name in tqdm(names, desc="latents", disable=rank > 0 or all(place(n).exists() for n in names)):
        if not place(name).exists():
            try:
                picture, sizes = source.load(name)
            except UNREADABLE as e:
                source.skip(name, e)
                continue
            aside = place(name).with_suffix(f".{rank}.tmp")
            torch.save({"latent": vae.encode(picture[None].to(device))[0].half().cpu(), "sizes": sizes}, aside)
            aside.replace(place(name))
    barrier()

    def load(name):
        kept = torch.load(place(name), weights_only=True)
        return kept["latent"].float(), kept["sizes"]

    source.load = load
