"""The few-step generator as a policy: reinforcement by densities, for AdvDMD and for DMDR's GRPO.

    π_θ(z_s|z_t) = N(α_s G(z_t, t), σ_s² I)               a step with fresh noise; the last has no density
    A            = clamp((R - mean)/(std + δ), ±A_max)    over a group: rollouts of one prompt, at the same step
    L_rl         = -E [ A log π_θ ]                       the plain policy gradient; log π is a mean over dimensions

    z_t, z_s     states of a rollout at a student step and at the next, (B, C, h, w)
    R            rewards; no gradient passes through them. What is rewarded is the method's

A group is one prompt several times: `grouped` repeats every g-th prompt and its real picture. A_max only matters for
groups of 11 or more.
NOTE: GRPO clips the ratio of the policy to the policy that made the rollout. Here every rollout is used for one update,
so the ratio is 1 and is never clipped: GRPO becomes the policy gradient with group-relative advantages.
Left out: KL to a reference; DM is the regulariser here.
"""

from dataclasses import replace

import torch

from diffusion import noise_to_step, times
from engine.errors import UserError

A_MAX, DELTA = 3.0, 1e-4


def check_groups(config, samples):
    """Raises UserError where --candidates does not divide what a rank, with `samples` of a batch, takes at once."""
    if (config.micro_batch or samples) % config.candidates:
        why = f"--candidates {config.candidates} must divide the samples that a rank takes at once"
        raise UserError(f"--method {config.method} needs whole groups: {why}")


def grouped(batch, g):
    """A batch in groups of g: the prompt, condition and real picture of every g-th sample, g times.

    Each sample keeps its own noise. Raises ValueError where g does not divide the batch.
    """
    if len(batch.prompts) % g:
        raise ValueError(f"groups of {g} do not fit {len(batch.prompts)} samples")
    return replace(
        batch,
        x_real=batch.x_real[::g].repeat_interleave(g, 0),
        prompts=[p for p in batch.prompts[::g] for _ in range(g)],
        c={k: v[::g].repeat_interleave(g, 0) for k, v in batch.c.items()},
    )


@torch.no_grad()
def simulate(G, z, c, S, generators):
    """The SDE backward simulation: z at S[0] -> [z, z_1, ..., x_0], the states at S[0], S[1], ..., 0. No gradient."""
    states = [z]
    for i in range(len(S)):
        x_0 = G(states[-1], times(S[i], z), c)
        states.append(noise_to_step(G.schedule, x_0, S, i + 1, generators))
    return states


def advantages(R, g):
    """A = clamp((R - mean)/(std + δ), ±A_max) within groups of g consecutive rows: R (B, n) -> (B, n)."""
    groups = R.view(-1, g, R.shape[1])
    A = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + DELTA)
    return A.clamp(-A_MAX, A_MAX).view_as(R)


def loss(z_s, x_0, alpha_s, sigma_s, A):
    """L_rl = -E [A log π_θ(z_s|z_t)] of one transition, log π = -|z_s - α_s x_0|²/2σ_s², a mean. Scalar.

    z_s, x_0 = G(z_t, t) (B, C, h, w); alpha_s, sigma_s (B, 1, 1, 1); A (B,).
    """
    log_pi = -((z_s - alpha_s * x_0).square() / (2 * sigma_s**2)).flatten(1).mean(1)
    return -(A * log_pi).mean()


def reinforce(G, states, S, c, A, weight):
    """The backward passes of weight L_rl, a mean over the transitions with a density, one graph of G at a time -> L_rl.

    states: of `simulate`; A (B, len(S) - 1): the advantages of its transitions but the last. With one step there is
    nothing to reinforce: 0.
    """
    z = states[0]
    total = torch.zeros((), device=z.device)
    for i in range(len(S) - 1):
        s = times(S[i + 1], z)
        x_0 = G(states[i], times(S[i], z), c)
        L = loss(states[i + 1], x_0, G.schedule.alpha(s), G.schedule.sigma(s), A[:, i]) / (len(S) - 1)
        (weight * L).backward()
        total = total + L.detach()
    return total
