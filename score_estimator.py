"""The generator's score estimator μ_fake (Flash-DMD 3.1, 3.3 "Stabilize Score Estimator"; Eq. 6 and 11).

    Eq. 6    L_diffusion = E ||μ_ψ(x_t, t) - ε||²      its only loss (DMD2's: siblings/dmd2.py)
    Eq. 11   ψ <- λ_ema ψ + (1 - λ_ema) θ              after every generator update, of any loss

    x    the generator's clean estimate, detached, (B, C, h, w)
    t    uniform over the whole range;  x_t = α_t x + σ_t ε
    ψ    the estimator's weights;  θ the generator's

How often Eq. 6 runs (TTUR) is in train.py: in every distillation loop, in no preference update.
Left out: DMD2's second task, Eq. 7.
"""

import torch

from diffusion import add_noise, rand, randn


def draw(schedule, generators, like):
    """Draws t and ε of Eq. 6: t (B,) uniform over the whole range, ε (B, C, h, w), shaped as `like`."""
    t = schedule.t_at(rand(generators, like.device))
    return t, randn(generators, like)


def loss(fake, x, t, eps, c):
    """Eq. 6: E ||μ_ψ(x_t, t) - ε||², a mean over elements, computed from the clean estimate. Scalar.

    fake: a Denoiser; x, eps (B, C, h, w); t (B,). The error is that of the network's own output:
    (α_t/σ_t)² ||x̂_0 - x||² is the squared error of ε̂, 1/σ_t² ||x̂_0 - x||² that of a flow's v̂.
    """
    x_t = add_noise(fake.schedule, x, t, eps)
    return (fake.schedule.weight(t) * (fake(x_t, t, c) - x) ** 2).mean()


@torch.no_grad()
def pull(psi, theta, lam):
    """Eq. 11: ψ <- λ ψ + (1 - λ) θ, in place.

    psi, theta: fp32 parameters in the same order and sharding; bf16 would lose (1 - λ)(θ - ψ).
    λ in [0, 1]; 1 is "off".
    ASSUMPTION: the value of λ is not in the paper; results/stage1.md has the sweep that chose ours.
    NOTE: on LoRAs this averages the factors A and B, not the products B A: their average has a higher rank.
    Both LoRAs start from one A; the two averages differ only by (1 - λ) λ (B_ψ - B_θ)(A_ψ - A_θ).
    """
    if lam < 1:
        for p, q in zip(psi, theta, strict=True):
            p.mul_(lam).add_(q, alpha=1 - lam)
