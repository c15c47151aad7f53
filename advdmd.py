"""AdvDMD, "Adversarial Reward Meets DMD For High-Quality Few-Step Generation" (2026): DMD2's discriminator as an online reward.

What is known, from the abstract: the discriminator of DMD2 is the reward model (real high, generated low); it is trained on
intermediate AND final states of sampling, online with the generator; one SDE backward simulation serves distribution matching
and reinforcement learning; the two follow different schedules. From quotations: GRPO, deferred until G and D are stable.
THE REST IS OUR RECONSTRUCTION:

    π_θ(z_s|z_t) = N(α_s G(z_t, t), σ_s² I)                        a student step and fresh noise; the last step, to 0, has no density
    R(z_s)       = the logit of D at z_s, level s                  D: latent_gan.py's head on the score estimator's bottleneck
    A            = clamp((R - mean)/(std + δ), ±A_max)             over a group: rollouts of one prompt, same state
    L_rl         = -E min(ρ A, clamp(ρ, 1 - ε, 1 + ε) A)           ρ = (π_θ/π_old)^(1/numbers), the ratio of mean densities

    states       z_s at every student step but the first, and x_0;  the final state's A is added to that of the last z_s, its only cause
    gate         RL runs while D tells real from generated on a batch it has not been trained on yet (--rl-gate)

A group needs one prompt several times: `spread` repeats every g-th, its real picture too. A_max binds from groups of 11 on, and ρ leaves 1
only where a rollout is used twice, which train.py does not do. G has no direct adversarial term (Eq. 5): the reward is D's only way to it.
Left out: KL to a reference; DM is the regulariser here.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from diffusion import add_noise, randn, renoise, times

CLIP, MOST, DELTA = 0.2, 3.0, 1e-4  # ε, A_max, δ


def spread(values, g):
    """Every g-th of a list or a batch, g times over: the prompts of groups of g. Raises ValueError where g does not divide it."""
    if len(values) % g:
        raise ValueError(f"groups of {g} do not fit {len(values)} samples")
    if isinstance(values, torch.Tensor):
        return values[::g].repeat_interleave(g, 0)
    return [v for v in values[::g] for _ in range(g)]


@torch.no_grad()
def simulate(G, z, c, S, generators):
    """The SDE backward simulation: z at S[0] -> [z, z_1, ..., x_0], the states at S[0], S[1], ..., and the clean end. No gradient."""
    states = [z]
    for i in range(len(S)):
        states.append(renoise(G.schedule, G(states[-1], times(S[i], z), c), S, i + 1, generators))
    return states


def levels(S, like):
    """The timesteps of the states that D judges, S[1:] and 0, each (B,)."""
    return [times(t, like) for t in (*S[1:], torch.zeros_like(S[0]))]


def logits(fake, head, states, S, c):
    """R of the judged states: a list of states' [1:] -> (B, number of states)."""
    return torch.stack([head(fake.with_features(z, t, c)[1]) for z, t in zip(states[1:], levels(S, states[0]), strict=True)], 1)


def judged(fake, head, states, x_real, S, eps, c):
    """D's logits of real latents at the levels of the states, and of the states, (B, number of states) each; the second are R.

    x_real, eps (B, C, h, w): real latents and their noise, of which the last level, that of the clean end, has none.
    """
    reals = [x_real, *(add_noise(fake.schedule, x_real, t, eps) for t in levels(S, x_real)[:-1]), x_real]
    return logits(fake, head, reals, S, c), logits(fake, head, states, S, c)


def discriminator_loss(real, made):
    """Eq. 7 on the states of sampling: E -log D(real at level s) + E -log(1 - D(z_s)). real, made: logits (B, n). Scalar."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def accuracy(real, made):
    """The share of logits on the right side of 0, reals and made counted alike."""
    return ((real > 0).float().mean() + (made <= 0).float().mean()) / 2


def advantages(R, g):
    """A = clamp((R - mean)/(std + δ), ±A_max) within groups of g: R (B, n) -> (B, n); rows of a group stand together."""
    grouped = R.view(-1, g, R.shape[1])
    A = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + DELTA)
    return A.clamp(-MOST, MOST).view_as(R)


def credit(A):
    """Advantages of the states (B, n) -> of the n - 1 transitions that have a density: the end's is added to the last one's. (B, n - 1)."""
    return torch.cat([A[:, :-2], A[:, -2:].sum(1, keepdim=True)], 1)


def loss(z_s, x0_theta, x0_old, alpha_s, sigma_s, A):
    """-E min(ρ A, clamp(ρ, 1 ± ε) A) of one transition. z_s, x0_theta, x0_old (B, C, h, w); A (B,). Scalar.

    log ρ = [|z_s - α_s x0_old|² - |z_s - α_s x0_θ|²]/2σ_s², the mean over numbers.
    """
    old, new = ((z_s - alpha_s * x_0).square() for x_0 in (x0_old, x0_theta))
    rho = ((old - new) / (2 * sigma_s**2)).flatten(1).mean(1).exp()
    return -torch.minimum(rho * A, rho.clamp(1 - CLIP, 1 + CLIP) * A).mean()


def reinforce(cast, part):
    """AdvDMD: the gradients of its policy loss, where D is not blind on this batch. -> what to log.

    D is the run's own, online, which has not been trained on the batch yet; with --judge another run's, frozen (the comparison that the
    abstract draws), which has where that run had the same seed and data.
    """
    config, G, S, states, c = cast.config, cast.G, cast.S, part.states, part.c
    with torch.no_grad():
        real, R = judged(*cast.judge, states, cast.latents(part.x_real), S, randn(part.unseen, part.x), c)
        right = accuracy(real, R)
    if dist.is_initialized():
        dist.all_reduce(right)
        right /= cast.ranks
    total = torch.zeros((), device=part.x.device)
    if right >= config.rl_gate:
        A = credit(advantages(R, config.candidates))
        for i in range(len(S) - 1):
            s = times(S[i + 1], part.x)
            x0 = G(states[i], times(S[i], part.x), c)  # one update per rollout: π_old is π_θ, so ρ is 1 and its gradient is not 0
            L = loss(states[i + 1], x0, x0.detach(), G.schedule.alpha(s), G.schedule.sigma(s), A[:, i]) / (len(S) - 1)
            (part.share * config.gan_weight * L).backward()
            total = total + L.detach()
    return {"rl_loss": total, "reward": R[:, -1].mean(), "d_accuracy_unseen": right, "rl_open": (right >= config.rl_gate).float()}
