"""--cache-latents: the VAE's latents of the pictures of a folder or of shards, encoded once and kept for all ranks.

    DIR/settings.json            data, model and resolution of the latents
    DIR/1a2b3c4d....safetensors  one picture, named by the SHA-1 of its name: latent (C, h, w) in fp16, sizes (6,)

For methods that see latents alone, and for Pixel-GAN with --gan-reals vae. The cache does not notice a picture that
changes and keeps its name.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from tqdm import trange

from engine.decode import Unusable
from engine.distributed import barrier
from engine.errors import UserError

SETTINGS = ("data", "model", "resolution")


@dataclass
class Kept:
    """A picture's name -> its latent (C, h, w) and sizes (6,)."""

    folder: Path

    def place(self, name):
        return self.folder / (hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest() + ".safetensors")

    def __call__(self, name):
        try:
            kept = load_file(self.place(name))
        except FileNotFoundError:  # another rank could not use the picture, and said why
            raise Unusable("it has no latent in the cache") from None
        except Exception as e:  # safetensors has its own error
            raise UserError(f"cannot read {self.place(name)}: delete it, and it is made again ({e})") from None
        return kept["latent"].float(), kept["sizes"]


def check(config):
    """Raises UserError where --cache-latents is another kind of folder; writes nothing."""
    folder = Path(config.cache_latents)
    if folder.exists() and any(folder.iterdir()):
        try:
            found = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{folder} is not a latent cache (it has no settings.json): give another --cache-latents"
            ) from None
        wanted = {k: str(getattr(config, k)) for k in SETTINGS}
        if found != wanted:
            raise UserError(f"{folder} holds latents of {found}, not {wanted}: give another --cache-latents")


def fill(source, vae, config, rank=0, ranks=1, together=256):
    """In place: `source` gives latents instead of pictures. All ranks encode the missing ones first.

    The ranks wait for each other after every `together` pictures, so that none runs far ahead.
    """
    source = getattr(source, "source", source)  # the images' source of a Prompted one
    kept = Kept(Path(config.cache_latents))
    device = next(vae.parameters()).device
    if rank == 0:
        kept.folder.mkdir(parents=True, exist_ok=True)
        aside = kept.folder / f"settings.{os.getpid()}"
        aside.write_text(json.dumps({k: str(getattr(config, k)) for k in SETTINGS}, indent=2) + "\n")
        aside.replace(kept.folder / "settings.json")
    barrier()
    for first in trange(0, len(source.rows), together * ranks, desc="latents", disable=rank > 0):
        for name, _ in source.rows[first + rank : first + together * ranks : ranks]:
            if kept.place(name).exists() or name in source.bad:
                continue
            try:
                picture, sizes = source.load(name)
            except Unusable as e:
                source.bad.add(name, e)
                continue
            aside = kept.place(name).with_suffix(f".{os.getpid()}-{rank}")
            latent = vae.encode(picture[None].to(device))[0].half().cpu()
            save_file({"latent": latent, "sizes": sizes}, aside)
            aside.replace(kept.place(name))
        barrier()
    source.latents = kept
