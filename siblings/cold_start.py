"""DMDR's dynamic cold start: DynaDG and DynaRS.

    c_k      (1 + cos(π min(k/K, 1)))/2                 1 at the first generator update, 0 from the K-th on
    DynaDG   μ_fake = teacher + 2 ΔW,  μ_real = teacher + r_0 c_k ΔW       one network, one LoRA ΔW, two scales
    DynaRS   t = t(u),   u ~ Beta(1 + 3 c_k, 1 + c_k/2)                    renoise times: high noise first, then uniform

    k        generator updates so far;  K, r_0: --dynamic, --real-scale

NOTE: t(u) is the schedule's, at eps-prediction too. The DM loss maps u into --renoise, Eq. 6 does not.
"""

import math

import numpy as np
import torch

from diffusion import rand

FAKE_SCALE = 2.0  # of ΔW in μ_fake


def c_at(k, K):
    """c_k = (1 + cos(π min(k/K, 1)))/2, in [0, 1]; 0 without a dynamic phase (K = 0)."""
    return (1 + math.cos(math.pi * min(k / K, 1))) / 2 if K else 0.0


def real_score(fake, scale):
    """DynaDG: the score estimator's network with its LoRA at `scale`, as a Denoiser; at 0 the teacher, bit for bit."""

    @torch.no_grad()
    def x_0(x_t, t, c):
        own = fake.scales
        fake.scales = own | {"fake": scale}
        try:
            return fake(x_t, t, c)
        finally:
            fake.scales = own

    x_0.schedule = fake.schedule
    return x_0


def noise_level(generators, k, K, device="cpu"):
    """DynaRS: u ~ Beta(1 + 3 c_k, 1 + c_k/2) for k < K, then uniform; one per sample, (B,) in [0, 1].

    generators: one per sample. numpy draws the Beta variable, from the sample's own seed.
    """
    if k >= K:
        return rand(generators, device)
    c_k = c_at(k, K)
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in generators]
    u = [np.random.default_rng(seed).beta(1 + 3 * c_k, 1 + c_k / 2) for seed in seeds]
    return torch.tensor(u, dtype=torch.float32, device=device)
