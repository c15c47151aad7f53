"""Distribution matching (Flash-DMD 3.1, 3.3; Eq. 3 and 4).

    Eq. 3   s(x_t, t) = -(x_t - α_t μ(x_t, t)) / σ_t²
    Eq. 4   ∇_θ L_DMD = -E [ (s_real(x_t) - s_fake(x_t)) dG/dθ ],   x = G_θ(x_τ, τ),  x_t = α_t x + σ_t ε

    x                 the generator's clean estimate, (B, C, h, w)
    x0_real, x0_fake  μ_real, μ_fake: clean estimates of the guided teacher and of the generator's score estimator
    τ                 the generator's own input step, from S without its last: the timestep-aware part (3.3)
    t                 renoise time, drawn per sample
    c                 the prompts' condition

Left out: DMD's regression loss, and DMD2's adversarial term (Eq. 5).
"""

import numpy as np
import torch

from diffusion import add_noise, rand


def student_step(S, which, seed, loop):
    """3.3: the student step τ = S[i] of a loop's DM loss -> i, the same on every rank.

    which: "high" draws uniformly from S without its last step (3.3: timestep-aware), "all" from S (line 6).
    NOTE: line 6 samples from all of S; 3.3 says high-noise steps, as here by default.
    ASSUMPTION: the only step of a one-step student has this loss and Pixel-GAN's: the paper has 4 and 8 steps.
    """
    without_last = which == "high" and len(S) > 1
    return int(np.random.default_rng([seed, loop]).integers(len(S) - without_last))


def renoise_time(schedule, between, generators, device="cpu"):
    """Algorithm 1, line 13: t ~ T_noisy, one per sample, (B,).

    between: (low, high), the part of the noise range to draw from.
    ASSUMPTION: T_noisy is 0.02 to 0.98 of the range by default, as in DMD; 3.1 says U(0, T).
    """
    low, high = between
    return schedule.t_at(low + (high - low) * rand(generators, device))


def score(x_t, x_0, alpha_t, sigma_t):
    """Eq. 3: s = -(x_t - α_t x_0)/σ_t². x_t, x_0 (B, C, h, w); alpha_t, sigma_t (B, 1, 1, 1)."""
    return -(x_t - alpha_t * x_0) / sigma_t**2


@torch.no_grad()
def score_difference(teacher, fake, x, t, eps, c):
    """Eq. 4's bracket with its sign: s_fake(x_t) - s_real(x_t), the direction in x that RAISES the KL divergence.

    teacher (guided), fake: Denoisers. x, eps (B, C, h, w); t (B,).
    Returns the difference and x0_real, both (B, C, h, w), fp32.
    """
    schedule = fake.schedule
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    x_t = add_noise(schedule, x.float(), t, eps)
    x0_real = teacher(x_t, t, c)
    x0_fake = fake(x_t, t, c)
    return score(x_t, x0_fake, alpha_t, sigma_t) - score(x_t, x0_real, alpha_t, sigma_t), x0_real


@torch.no_grad()
def gradient(teacher, fake, x, t, eps, c):
    """Eq. 4 with DMD's weight: g = w_t (s_fake - s_real), w_t = (σ_t²/α_t) / mean|x - x0_real|, per sample.

    That is g = (x0_fake - x0_real) / mean|x - x0_real|: the same scale at every noise level. (B, C, h, w).
    ASSUMPTION: the weight is DMD's (Flash-DMD prints none). Where x is x0_real, w_t has no value and g is 0; any other
    g that is not finite stays so, and the update is skipped.
    """
    schedule = fake.schedule
    difference, x0_real = score_difference(teacher, fake, x, t, eps, c)
    error = (x.float() - x0_real).abs().mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    w_t = schedule.sigma(t) ** 2 / schedule.alpha(t) / error
    return (w_t * difference).where(error != 0, 0)


def loss(x, g):
    """Eq. 4 as a loss: L = 1/2 mean (x - sg(x - g))², so that dL/dx = g / (number of elements). Scalar."""
    return 0.5 * (x.float() - (x.float() - g).detach()).square().mean()
