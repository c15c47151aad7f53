"""DMDR, "Distribution Matching Distillation Meets Reinforcement Learning" (Jiang et al., 2025): what it adds to plain DMD.

    c_k      (1 + cos(π min(k/K, 1)))/2                         1 at the first generator update, 0 from the K-th on: the cold start
    DynaDG   μ_fake = teacher + 2 ΔW,   μ_real = teacher + r_0 c_k ΔW      one network, one LoRA ΔW, two scales
    DynaRS   t = t(u),   u ~ Beta(1 + 3 c_k, 1 + c_k/2)         renoise times: biased to high noise, then uniform
    RL       L = L_DMD + w E max(0, m - R(x_s))                 from update K on; gradient through the one step x = G_θ(x_τ, τ)

    k        generator updates so far;  K, r_0, w, m: --dynamic, --real-scale, --reward-weight, --reward-margin
    x_s      x re-noised to the next student step s, where the latent reward model looks; or x itself for a judge of pictures

So the target starts near the student and moves to the teacher, and reward joins once the two are close; from then on the learning
rates are halved (train.py's `pace`). Schedules as in the authors' public demo, which is one-step and flow-based.
ASSUMPTION: the values of w and m, of which only ranges are known; r_0 is the one-step demo's, 0.75 (0.5 is reported for SD3).
NOTE: t(u) is the schedule's, at eps-prediction too; the DM loss squeezes u into --renoise, Eq. 6 does not. The teacher's guidance stays
on, also while its LoRA is worn. x_s takes the DM loss's own noise.
Left out: GRPO and DPO, which the paper names beside the back-propagated reward; their losses are not public.
"""

import math

import numpy as np
import torch

from diffusion import add_noise, times

FAKE_SCALE = 2.0  # of ΔW in μ_fake


def c_at(k, K):
    """c_k = (1 + cos(π min(k/K, 1)))/2, in [0, 1]; 0 without a dynamic phase (K = 0)."""
    return (1 + math.cos(math.pi * min(k / K, 1))) / 2 if K else 0.0


def real_score(fake, scale):
    """DynaDG: the score estimator's network with its LoRA at `scale` instead, as a Denoiser; at 0 it is the teacher, bit for bit."""

    @torch.no_grad()
    def x_0(x_t, t, c):
        own, fake.scales = fake.scales, fake.scales | {"fake": scale}
        try:
            return fake(x_t, t, c)
        finally:
            fake.scales = own

    x_0.schedule = fake.schedule
    return x_0


def renoise_share(generators, c_k, device="cpu"):
    """DynaRS: u ~ Beta(1 + 3 c_k, 1 + c_k/2), one per sample, (B,) in [0, 1]; uniform at c_k = 0. generators: one per sample.

    A Beta variable is X/(X + Y) of two Gamma variables, which numpy draws from a seed of the sample's own.
    """
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in generators]
    u = [np.random.default_rng(seed).beta(1 + 3 * c_k, 1 + c_k / 2) for seed in seeds]
    return torch.tensor(u, dtype=torch.float32, device=device)


def reward_loss(reward, x, margin):
    """E max(0, m - R(x)). x (B, C, h, w) with gradient; reward: a callable x -> scores (B,) that passes gradient on. -> (scalar, scores)."""
    scores = reward(x)
    return (margin - scores).clamp(min=0).mean(), scores.detach()


def judge(cast, part, i, eps):
    """DMDR's reward of a clean estimate x at student step i, as a callable: CLIP's of the picture, or the latent reward model's of x
    re-noised to the next student step (to the last one from the last)."""
    if cast.config.reward == "clip":
        return lambda x: cast.R.score(cast.R.features(cast.vae.decode(x)), part.prompts)
    s, c_R = times(cast.S[min(i + 1, len(cast.S) - 1)], part.x_real), cast.R.encoder.encode(part.prompts)
    return lambda x: cast.R(add_noise(cast.G.schedule, x, s, eps), s, c_R)
