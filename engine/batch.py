"""A loop's data on one rank, and its micro-batches."""

from dataclasses import dataclass, replace

import torch

from diffusion import sample_generators


@dataclass
class Batch:
    """The samples of one loop on this rank, or some of them. It holds data only, no output of a network."""

    x_real: torch.Tensor  # (B, 3, H, W) pictures in [-1, 1]; with --cache-latents their latents (B, C, h, w)
    prompts: list  # B strings
    c: dict  # the prompts' condition: tensors, batch first
    samples: list  # B global sample numbers, which seed their noise
    loop: int  # of Algorithm 1, from 1
    seed: int = 0  # of the run
    watched: bool = False  # whether this loop's health signals are logged
    weight: float = 1.0  # of a micro-batch's losses: its fraction of the rank's batch

    def generators(self, purpose):
        """A generator per sample, a function of (run seed, loop, sample, purpose) alone."""
        return sample_generators(self.seed, self.loop, self.samples, purpose)


def micro_batches(batch, size):
    """The batch in parts of `size` samples; 0: in one part. Their gradients add up."""
    size = size or len(batch.samples)
    parts = []
    for first in range(0, len(batch.samples), size):
        rows = slice(first, first + size)
        part = replace(
            batch,
            x_real=batch.x_real[rows],
            prompts=batch.prompts[rows],
            c={k: v[rows] for k, v in batch.c.items()},
            samples=batch.samples[rows],
            weight=size / len(batch.samples),
        )
        parts.append(part)
    return parts
