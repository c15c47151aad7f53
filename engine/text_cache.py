"""--cache-text: the conditions of every prompt of a run, encoded once, before training; then no text encoder is held.

    DIR/text-1a2b3c4d.../encoder.json         which encoder: its files, its dtype, T5's length
    DIR/text-1a2b3c4d.../5e6f....safetensors  a prompt, named by the SHA-1 of its text: tokens (1, L, D), pooled (1, P)

Numbers are kept in the encoder's dtype, so nothing is rounded. A folder may hold several encoders, and serve several
runs. Ranks share the work by chunks of prompts, which are the same on any number of ranks and after a kill.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import trange

from diffusion import batched
from engine import text
from engine.distributed import barrier, from_rank_0, gathered, rank_and_ranks
from engine.errors import UserError

CHUNK = 16  # prompts that are encoded together


@dataclass
class Kept:
    """B prompts -> their condition on `device`, without sizes, padded to one length."""

    folder: Path
    device: object

    def place(self, prompt):
        return self.folder / (hashlib.sha1(prompt.encode("utf-8", "surrogateescape")).hexdigest() + ".safetensors")

    def read(self, prompt):
        """The condition of a prompt, a batch of one, memory-mapped. Raises UserError where it is not there or torn."""
        path = self.place(prompt)
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except FileNotFoundError:
            raise UserError(f"{self.folder} lacks the prompt {prompt[:60]!r}: start again, and it is encoded") from None
        except Exception as e:  # safetensors has its own error
            raise UserError(f"cannot read {path}: delete it, and it is made again ({e})") from None

    def __call__(self, prompts):
        c = {key: v.to(self.device) for key, v in batched([self.read(prompt) for prompt in prompts]).items()}
        return {key: v.float() if v.is_floating_point() else v for key, v in c.items()}

    def write(self, prompt, c, dtype):
        """Write a prompt's condition, a batch of one, aside and rename it: a kill leaves none torn."""
        c = {key: v.to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous() for key, v in c.items()}
        aside = self.place(prompt).with_suffix(f".{os.getpid()}")
        try:
            aside.write_bytes(save(c))
            aside.replace(self.place(prompt))
        except OSError:  # a full disk
            aside.unlink(missing_ok=True)
            raise

    def begin(self, identity, chunks):
        """Make the folder -> the numbers of the chunks of which a prompt is lacking."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "encoder.json").write_text(json.dumps(identity, indent=2) + "\n")
        there = set(os.listdir(self.folder))
        return [i for i, chunk in enumerate(chunks) if not all(self.place(p).name in there for p in chunk)]


def prompts_of(config, source):
    """Every prompt that a run may encode: the null one, those of the data or of --prompts, held-out ones, --watch's."""
    found = ["", *source.every_prompt()]
    if source.held_out and config.stage == 2:
        found += source.held_out(0, 64)[1]
    if config.watch:
        found += text.prompts(config.watch, "--watch")
    return list(dict.fromkeys(found))


@torch.no_grad()
def fill(encoder, prompts, folder):
    """In place: `encoder` gives what is kept in `folder` and holds no network. The ranks encode what is missing first.

    An encoder that is not loaded is loaded only where there is something to encode. Raises UserError for a prompt that
    cannot be encoded or written.
    """
    rank, ranks = rank_and_ranks()
    identity = encoder.identity()
    key = hashlib.sha1(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    kept = Kept(Path(folder) / f"text-{key}", encoder.device)
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    todo = from_rank_0(lambda: kept.begin(identity, chunks))
    if todo[rank:] and not encoder.encoders:
        encoder.load()
    cut = []  # of this rank's prompts
    for first in trange(0, len(todo), ranks, desc="prompts", disable=rank > 0 or not todo):
        for i in todo[first + rank : first + rank + 1]:
            cut += encoder.too_long(chunks[i])
            c = encoder.text(chunks[i])
            for row, prompt in enumerate(chunks[i]):
                kept.write(prompt, {key: v[row : row + 1] for key, v in c.items()}, encoder.dtype)
        barrier()  # none runs far ahead
    cut = [found for found in gathered({rank: cut}).values() if found]
    if cut and rank == 0:
        encoder.warn(sum(map(len, cut)), f"{sum(len(chunks[i]) for i in todo)} prompts", cut[0][0])
    encoder.unload()
    encoder.kept = kept
