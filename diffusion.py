"""Diffusion in one convention (Flash-DMD 2 "Diffusion Models", 3.3): Eq. 1, 2 and 8.

    Eq. 1   x_t = α_t x_0 + σ_t ε                                     forward process, in closed form
    Eq. 2   x_s = α_s x_0 + σ_s ε̂,  ε̂ = (x_t - α_t x_0)/σ_t           reverse step t -> s (DDIM, Euler)
    Eq. 8   x_{t1} = G(x_t, t);  x_0 = B(x_{t1}, 0)                   backward simulation B: re-noise, denoise, ... to 0

    x_0, x_t, ε    clean latent, noisy latent, noise, (B, C, h, w)
    α_t, σ_t       amplitudes. Score-based (SDXL, "eps" or "v"): sqrt(abar_t), sqrt(1 - abar_t). Flow (SD3): 1 - s, s
    t              0 = data, larger = noisier. Integers 0 .. 999; flow: 1000 s, s = shift u / (1 + (shift - 1) u)
    S              student steps τ_K > ... > τ_1, noisiest first

NOTE: the paper's Eq. 1 prints one step x_{t-1} -> x_t with α a variance factor; its Eq. 3 uses α_t as an amplitude.
Here α is always the amplitude, and abar_t is the product of Eq. 1's α.

A Denoiser is any callable (x_t, t, c) -> x_0 with a `schedule`; c is a dict of condition tensors, batch first.
Left out: higher-order samplers, and anything about networks (engine/models.py).
"""

from dataclasses import dataclass

import numpy as np
import torch

T = 1000


@dataclass(frozen=True)
class Schedule:
    """α_t, σ_t, and what the network predicts: "eps" = ε, "v" = α_t ε - σ_t x_0, "flow" = ε - x_0."""

    prediction: str = "eps"
    beta_start: float = 0.00085  # eps, v: betas are linear in their square roots
    beta_end: float = 0.012
    shift: float = 1.0  # flow
    betas: tuple = ()  # eps, v: all T of them, where they are not linear in their square roots
    spacing: str = "trailing"  # of the multi-step sampler's timesteps: trailing, leading or linspace
    offset: int = 0  # added to leading ones

    def alpha(self, t):
        """α_t for t (B,) -> (B, 1, 1, 1), fp32 on t's device."""
        return self._amplitudes(t)[0]

    def sigma(self, t):
        """σ_t for t (B,) -> (B, 1, 1, 1), fp32 on t's device."""
        return self._amplitudes(t)[1]

    def _amplitudes(self, t):
        if self.prediction == "flow":
            s = t.float() / T
            pair = 1 - s, s
        else:
            roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, T, dtype=torch.float64)
            betas = torch.tensor(self.betas, dtype=torch.float64) if self.betas else roots**2
            abar = torch.cumprod(1 - betas, 0).to(t.device)[t.long()]
            pair = abar.sqrt().float(), (1 - abar).sqrt().float()
        return [a.view(-1, 1, 1, 1) for a in pair]

    def t_at(self, u):
        """The timestep at a fraction u in [0, 1] of the noise range.

        eps, v: floor(1000 u), at most 999; flow: the shifted 1000 s.
        """
        if self.prediction == "flow":
            return T * self.shift * u / (1 + (self.shift - 1) * u)
        return (T * u).floor().clamp(0, T - 1).long()

    def steps(self, n):
        """The n timesteps of a student, noisiest first, (n,), n in 1 .. T. n = 4, SD3: s = 1, .9, .75, .5.

        SDXL: multiples of floor(T/n), less 1, as LCMScheduler has them: 999, 749, 499, 249; n = 3: 998, 665, 332.
        NOTE: section 8 prints 629 among the 8 steps, where equal spacing gives 624.
        """
        i = torch.arange(n, 0, -1)
        return self.t_at(i.double() / n).float() if self.prediction == "flow" else i * (T // n) - 1

    def sampler_steps(self, n):
        """The n timesteps of the multi-step teacher, noisiest first, (n,): as its scheduler's config spaces them."""
        if self.spacing == "leading":
            return torch.arange(n - 1, -1, -1) * (T // n) + self.offset
        if self.spacing == "linspace":
            return torch.linspace(T - 1, 0, n, dtype=torch.float64).round().long()
        if self.prediction == "flow":
            return self.steps(n)
        return (T * torch.arange(n, 0, -1, dtype=torch.float64) / n).round().long() - 1

    def x_0(self, output, x_t, t):
        """The network's output as x_0: (x_t - σ_t ε̂)/α_t, α_t x_t - σ_t v̂, or x_t - s v̂ (flow)."""
        alpha, sigma = self._amplitudes(t)
        if self.prediction == "eps":
            return (x_t.float() - sigma * output.float()) / alpha
        return (x_t.float() if self.prediction == "flow" else alpha * x_t.float()) - sigma * output.float()

    def weight(self, t):
        """The factor from a squared error of x_0 to one of the network's output, (B, 1, 1, 1).

        eps: (α_t/σ_t)²; v, flow: 1/σ_t².
        """
        alpha, sigma = self._amplitudes(t)
        return (alpha / sigma) ** 2 if self.prediction == "eps" else sigma**-2


def times(t, x):
    """One timestep for the whole batch: a scalar tensor t -> (B,) on x's device."""
    return torch.as_tensor(t, device=x.device).expand(x.shape[0])


def add_noise(schedule, x_0, t, eps):
    """Eq. 1: x_t = α_t x_0 + σ_t ε. x_0, eps (B, C, h, w); t (B,)."""
    return schedule.alpha(t) * x_0 + schedule.sigma(t) * eps


def reverse_step(schedule, x_t, x_0, t, s):
    """Eq. 2, without fresh noise: x_s = α_s x_0 + σ_s (x_t - α_t x_0)/σ_t. t, s (B,), s less noisy than t.

    For the score-based schedule this is DDIM with η = 0, for flow matching the Euler step.
    """
    eps = (x_t - schedule.alpha(t) * x_0) / schedule.sigma(t)
    return add_noise(schedule, x_0, s, eps)


def guided(denoiser, null, w):
    """Classifier-free guidance as a Denoiser: x_0 = x_0(null) + w (x_0(c) - x_0(null)), formed in fp32.

    null: the null prompt's condition, batch of one, of any length; sizes are taken from c. w = 1: the denoiser itself.
    """
    if w == 1:
        return denoiser

    def x_0(x_t, t, c):
        nulls = {k: v if k == "size" else null[k].expand(len(v), *null[k].shape[1:]) for k, v in c.items()}
        uncond, cond = denoiser(x_t.repeat(2, 1, 1, 1), t.repeat(2), batched([nulls, c])).float().chunk(2)
        return uncond + w * (cond - uncond)

    x_0.schedule = denoiser.schedule
    return x_0


def batched(conditions):
    """Conditions as one batch; tokens and mask (B, L, ...) are padded to the longest L, by zeros and False."""
    rows = {k: [row for c in conditions for row in c[k]] for k in conditions[0]}
    return {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in rows.items()}


@torch.no_grad()
def sample_ode(denoiser, x_t, c, n):
    """n reverse steps (Eq. 2) from pure noise x_t (B, C, h, w) to x_0: the multi-step teacher's sampler."""
    schedule = denoiser.schedule
    steps = schedule.sampler_steps(n)
    for i in range(n):
        t = times(steps[i], x_t)
        x_0 = denoiser(x_t, t, c)
        x_t = x_0 if i == n - 1 else reverse_step(schedule, x_t, x_0, t, times(steps[i + 1], x_t))
    return x_t


def backward_simulation(G, x_t, c, steps, generators, start=0, stop=None):
    """Eq. 8's B: x_0 = G(x_t, τ_i); x_t = α x_0 + σ ε at τ_{i+1}, with fresh noise, for i = start .. stop - 1.

    x_t: (B, C, h, w) at steps[start]. steps: S as a tensor, noisiest first. generators: one per sample.
    Returns x_t at steps[stop], or the clean x_0 where stop is the end of S. No gradient (Eq. 8's Detach).
    Called with 0 .. K it is the few-step sampler itself, so training sees the inputs of sampling.
    """
    with torch.no_grad():
        for i in range(start, len(steps) if stop is None else stop):
            x_0 = G(x_t, times(steps[i], x_t), c)
            x_t = noise_to_step(G.schedule, x_0, steps, i + 1, generators)
    return x_t


def noise_to_step(schedule, x_0, steps, i, generators):
    """x_0 noised to the i-th student step (Eq. 1), with fresh noise; after the last step x_0 itself.

    x_0 (B, C, h, w); steps: S, noisiest first; generators: one per sample.
    """
    if i == len(steps):
        return x_0
    return add_noise(schedule, x_0, times(steps[i], x_0), randn(generators, x_0))


def sample_generators(seed, iteration, indices, purpose):
    """One CPU generator per sample, a function of (run seed, iteration, global sample index, purpose) alone.

    So 1 rank x 16 and 2 ranks x 8 draw the same numbers, and a resumed run needs no saved RNG state.
    """
    generators = []
    for i in indices:
        key = np.random.SeedSequence([seed, iteration, int(i), *purpose.encode()])
        generators.append(torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1)))
    return generators


def randn(generators, like):
    """Standard normal noise, one generator per sample, shaped as `like` (B, ...) and on its device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like.device)


def rand(generators, device="cpu"):
    """One uniform number in [0, 1) per sample, (B,)."""
    return torch.cat([torch.rand(1, generator=g) for g in generators]).to(device)
