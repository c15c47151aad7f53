"""AdvDMD, "Adversarial Reward Meets DMD For High-Quality Few-Step Generation" (2026): D of DMD2 as an online reward.

Known from the abstract: the discriminator of DMD2 is the reward model (real high, generated low). It is trained on
intermediate AND final states of sampling, online with the generator. One SDE backward simulation serves distribution
matching and reinforcement learning; the two follow different schedules. Known from quotations: GRPO, deferred until G
and D are stable. THE REST IS OUR RECONSTRUCTION:

    R(z_s)       = the logit of D at z_s, level s         D: the head of siblings/dmd2.py
    L_rl         = -E [ A log π_θ ]                       siblings/policy.py: π_θ, and A, relative to a group

    states       z_s at every student step but the first, and x_0;  x_0's A is added to the A of the last z_s
    gate         RL runs while D tells real from generated on a batch that it is not trained on yet (--rl-gate)

G has no direct adversarial term (Eq. 5): D acts on G through the reward alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import dmd
import score_estimator
from diffusion import add_noise, randn, times
from engine import monitor
from engine.batch import micro_batches
from engine.distributed import total
from engine.errors import UserError
from siblings import dmd2, policy
from siblings.judge import frozen_discriminator


@dataclass
class Settings(dmd2.Settings):
    """AdvDMD's flags, added to DMD2's."""

    method: str = "advdmd"
    gan_weight: float = 1.0
    rl_after: int = 100  # generator updates before reinforcement begins
    rl_gate: float = 0.6  # reinforcement waits while D classifies fewer than this fraction of unseen latents right
    judge: str = ""  # a run whose discriminator, frozen, is the reward; default the run's own, in training

    def check(self):
        super().check()
        self.require("rl_after", self.rl_after >= 0, "must not be negative")
        self.require("rl_gate", 0 <= self.rl_gate <= 1, "must lie in [0, 1]")
        self.require("judge", self.gan_weight or not self.judge, "needs a --gan-weight")
        if self.gan_weight and self.student_steps == 1:
            why = "the last step has no density to reinforce"
            raise UserError(f"--method advdmd needs --student-steps of at least 2: {why} (--gan-weight 0: no RL)")

    def per_rank(self, ranks):
        samples = super().per_rank(ranks)
        policy.check_groups(self, samples)
        return samples


# -------------------------------------------------------------------------------- the discriminator of states


def levels(S, like):
    """The timesteps of the states that D sees, S[1:] and 0, each (B,)."""
    return [times(t, like) for t in (*S[1:], torch.zeros_like(S[0]))]


def logits(fake, head, states, S, c):
    """D's logits of states[1:], (B, len(states) - 1): D does not see the pure noise."""
    seen = [head(fake.with_features(z, t, c)[1]) for z, t in zip(states[1:], levels(S, states[0]), strict=True)]
    return torch.stack(seen, 1)


def logits_of_both(fake, head, states, x_real, S, eps, c):
    """D's logits of real latents at the levels of the states, and of the states, (B, n) each; the latter are R.

    x_real, eps (B, C, h, w): real latents and their noise; the last level, 0, has no noise.
    """
    noised = [add_noise(fake.schedule, x_real, t, eps) for t in levels(S, x_real)[:-1]]
    real = logits(fake, head, [x_real, *noised, x_real], S, c)
    return real, logits(fake, head, states, S, c)


def discriminator_loss(real, made):
    """Eq. 7 on states: E -log D(real at level s) + E -log(1 - D(z_s)). real, made: logits (B, n). Scalar."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def accuracy(real, made):
    """The fraction of logits on the right side of 0, the mean over real and made. Scalar in [0, 1]; 0.5 = chance."""
    return ((real > 0).float().mean() + (made <= 0).float().mean()) / 2


# ------------------------------------------------------------------------------------------ the policy


def credit(A):
    """Advantages of the states (B, n) -> of the transitions with a density (B, n - 1): x_0's is added to the last."""
    return torch.cat([A[:, :-2], A[:, -2:].sum(1, keepdim=True)], 1)


def reinforce(nets, batch, states):
    """The backward passes of L_rl, where D passes the gate on this batch -> the loss, and {name: value} to log.

    The run's own D is not trained on this batch yet. The D of --judge is, if that run had the same seed and data.
    """
    config, G, S, c = nets.config, nets.G, nets.S, batch.c
    fake, head = nets.rewarding
    with torch.no_grad():
        real = nets.latents(batch.x_real)
        eps = randn(batch.generators("unseen"), real)
        real_logits, R = logits_of_both(fake, head, states, real, S, eps, c)
        right, right_x0 = (
            total(accuracy(of_real, of_made)) / nets.ranks
            for of_real, of_made in ((real_logits, R), (real_logits[:, -1], R[:, -1]))
        )
    loss = torch.zeros((), device=real.device)
    if right >= config.rl_gate:
        A = credit(policy.advantages(R, config.candidates))
        loss = policy.reinforce(G, states, S, c, A, batch.weight * config.gan_weight)
    seen = {"d_accuracy_unseen": right, "d_accuracy_x0": right_x0, "rl_open": (right >= config.rl_gate).float()}
    return loss, {"rl_loss": loss, "reward": R[:, -1].mean(), **seen}


# ------------------------------------------------------------------------------------------ the method


def prepare(nets):
    """Adds DMD2's head, and `rewarding`, the (score estimator, head) that gives the reward: the run's, or --judge's."""
    dmd2.prepare(nets)
    nets.rewarding = (nets.fake, nets.D)
    if nets.config.judge:
        nets.rewarding = frozen_discriminator(nets)
        nets.denoisers.append(nets.rewarding[0])


def iterate(nets, batch, n):
    """The n-th loop of AdvDMD: lines 5-26 of Algorithm 1 with L_rl and Eq. 7 on states -> {name: value} to log."""
    config, G, fake, D, S = nets.config, nets.G, nets.fake, nets.D, nets.S
    parts = micro_batches(policy.grouped(batch, config.candidates), config.micro_batch)
    logged = monitor.Means()
    moves_G = n % config.ttur == 0  # line 12
    k = (n - 1) // config.ttur
    i = dmd.student_step(S, config.dm_steps, config.seed, batch.loop)
    loss_G = 0.0
    made = []  # of each micro-batch: x, the states of its rollout, and its random generators

    for b in parts:
        rng = b.generators("rollout")
        states = policy.simulate(G, randn(rng, nets.like(b)), b.c, S, rng)  # one simulation for DM and RL
        x_tau = states[i]  # line 8
        with torch.set_grad_enabled(moves_G):
            x = G(x_tau, times(S[i], x_tau), b.c)  # line 10
        if moves_G:
            rng_t = b.generators("renoise")
            t = dmd.renoise_time(G.schedule, config.renoise, rng_t, x.device)
            eps = randn(rng_t, x)
            L_dmd = dmd.loss(x, dmd.gradient(nets.guided_teacher, fake, x, t, eps, b.c))  # Eq. 4
            (b.weight * L_dmd).backward()
            loss_G += b.weight * L_dmd.detach()
            logged.add(b.weight, dm_loss=L_dmd)
        made.append((x.detach(), states, rng))
    if moves_G and D is not None and k >= config.rl_after:
        for b, (_, states, _) in zip(parts, made):
            L_rl, seen = reinforce(nets, b, states)
            loss_G += b.weight * config.gan_weight * L_rl
            logged.add(b.weight, **seen)

    if moves_G:  # lines 17-18
        logged["g_norm"], moved = nets.step("G", loss_G, config.clip_grad)
        if moved:
            score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema)  # Eq. 11

    for b, (x, states, _) in zip(parts, made):  # lines 20-23
        t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)
        L = L_fake = score_estimator.loss(fake, x, t, eps, b.c)  # Eq. 6
        logged.add(b.weight, fake_loss=L_fake)
        if D is not None:
            both = logits_of_both(fake, D, states, nets.latents(b.x_real), S, eps, b.c)
            L_D = discriminator_loss(*both)
            L = L_fake + config.critic_weight * L_D
            logged.add(b.weight, d_loss=L_D, d_accuracy=accuracy(*both))
        (b.weight * L).backward()
    logged["fake_norm"], _ = nets.step("fake", logged["fake_loss"], config.clip_grad)  # line 24
    if D is not None:
        nets.step("head", logged["d_loss"])

    if batch.watched:
        for b, (x, _, rng) in zip(parts, made):
            t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)
            x_0 = monitor.finish(G, x, i, b.c, S, rng)
            logged.add(b.weight, **monitor.health(nets, b, x_0, logged["fake_loss"], t, eps))
    return logged
