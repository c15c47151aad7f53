"""DMDR, "Distribution Matching Distillation Meets Reinforcement Learning" (Jiang et al., 2025): what it adds to DMD.

    cold start   k < K: the DM loss's target starts near the student and moves to the teacher (DynaDG), and renoise
                 times are high first, then uniform (DynaRS): siblings/cold_start.py
    RL           k >= a K: L = L_DMD + w L_rl, at half the learning rates. Two branches (--rl): siblings/reward.py

    k            generator updates so far
    K, a, w      --dynamic, --reward-start, --reward-weight

The schedules are those of the authors' public demo, which is flow-based and class-conditional. Its other values are
noted below: --reward-start 2 --dm-input renoised --lora-layers qv --guidance 1 --reward-weight 0.05.
ASSUMPTION: w and the reward's margin; only their ranges are known. --real-scale is the one-step demo's, 0.75 (0.5 is
reported for SD3).
NOTE: the teacher is guided, also while its LoRA is on; the demo's is not.
Left out: DPO, which the paper names beside the two branches.
"""

from dataclasses import dataclass

import torch

import dmd
import score_estimator
from diffusion import add_noise, backward_simulation, guided, randn, times
from engine import metrics, monitor
from engine.batch import micro_batches
from engine.config import Config
from engine.errors import UserError
from engine.models import add_lora
from engine.reward_layout import reward_folder
from siblings import policy
from siblings.cold_start import FAKE_SCALE, c_at, noise_level, real_score
from siblings.reward import reinforce, reward_at, reward_loss

QV = ["to_q", "to_v", "add_q_proj", "add_v_proj"]  # --lora-layers qv. ASSUMPTION: those of SD3's text tokens too


@dataclass
class Settings(Config):
    """DMDR's flags, and its values of the common ones."""

    method: str = "dmdr"
    dm_steps: str = "all"
    ttur: int = 5
    ema: float = 1.0
    gan_weight: float = 0.0
    fake_lora: int = 16  # rank of the LoRA that makes the teacher the score estimator; 0 = a copy of its own
    # NOTE: the demo's LoRA adapts q and v alone; ours, by default, all layers that this code's other LoRAs adapt.
    lora_layers: str = "all"  # what --fake-lora adapts: all, or qv = queries and values of attention
    dynamic: int = 100  # K, generator updates of the cold start (DynaDG, DynaRS); 0 = none. Needs --fake-lora
    real_scale: float = 0.75  # r_0, the LoRA's scale in the real score at the start
    # NOTE: with more than one student step the demo is "renoised"; ours trains G on its inputs at sampling.
    dm_input: str = "rollout"  # x_tau: rollout = its state; renoised = G's clean estimate of it, noised back to tau
    rl: str = "backprop"  # the reward's branch: backprop, or grpo = policy gradient over --candidates rollouts a prompt
    # NOTE: the demo starts the reward at 2 K, ours as the cold start ends.
    reward_start: float = 1.0  # a: the reward joins after a K generator updates
    # NOTE: 0.05 in the demo, beside a classifier's cross-entropy.
    reward_weight: float = 0.1  # w, weight of the reward loss beside the DM loss, once it has joined; 0 = none
    reward_margin: float = 8.0  # m, the score above which the back-propagated reward loss is 0

    def check(self):
        super().check()
        for name in ("fake_lora", "dynamic", "reward_weight", "reward_start"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        if self.gan_weight:
            raise UserError("--method dmdr has no GAN: leave --gan-weight out")
        if self.dynamic and not (self.fake_lora or self.lora_rank):
            raise UserError("--dynamic needs --fake-lora: DynaDG scales the score estimator's LoRA")
        if self.teacher and self.dynamic:
            raise UserError("--teacher needs --dynamic 0: DynaDG's real score is the score estimator's own network")
        if self.fake_lora and not self.lora_rank and self.ema < 1:
            raise UserError("--fake-lora needs --ema 1: Eq. 11 pulls whole weights, not a LoRA's")
        if self.lora_layers == "qv" and (self.lora_rank or not self.fake_lora):
            raise UserError("--lora-layers qv is for the LoRA of --fake-lora: give one, and leave --lora-rank out")
        if self.by_density() and self.student_steps == 1:
            raise UserError("--rl grpo needs --student-steps 2 or more: the last step has no density to reinforce")
        if self.reward_weight and self.reward != "clip" and not self.dry_run:
            reward_folder(self)

    def by_density(self):
        """Whether the reward joins as GRPO."""
        return self.rl == "grpo" and self.reward_weight > 0

    def per_rank(self, ranks):
        samples = super().per_rank(ranks)
        if self.by_density():
            policy.check_groups(self, samples)
        return samples


# ------------------------------------------------------------------------------------------ the method


def prepare(nets):
    """Makes the score estimator a LoRA on the frozen teacher's weights, and loads the reward model."""
    config = nets.config
    fake = nets.fake
    if config.lora_rank:  # the score estimator is a LoRA already
        fake.scales = fake.scales | {"fake": FAKE_SCALE}
    elif config.fake_lora:
        layers = QV if config.lora_layers == "qv" else None
        add_lora(fake.net, config.fake_lora, "fake", dtype=nets.dtype, layers=layers)
        fake.scales = {"fake": FAKE_SCALE}
    if config.reward_weight and config.stage == 1:  # stage 2 loads its own
        nets.R = metrics.Clip(config.clip, nets.latent.device) if config.reward == "clip" else nets.load_reward()


def estimates(G, x_tau, tau, c, generators, moves_G, renoised):
    """Line 10 -> x = G(x_τ, τ), with gradient where G moves, and the estimate that the score estimator trains on, x.

    renoised: x starts from that estimate, noised back to τ (Eq. 1).
    """
    tau = times(tau, x_tau)
    with torch.set_grad_enabled(moves_G and not renoised):
        x = G(x_tau, tau, c)
    first = x.detach()
    if moves_G and renoised:
        x = G(add_noise(G.schedule, first, tau, randn(generators, first)), tau, c)
    return x, first


def iterate(nets, batch, n):
    """The n-th loop of DMDR: lines 5-24 of Algorithm 1 with DynaDG, DynaRS and the reward -> {name: value} to log."""
    config, G, fake, S = nets.config, nets.G, nets.fake, nets.S
    schedule = G.schedule
    K = config.dynamic
    logged = monitor.Means()
    moves_G = n % config.ttur == 0  # line 12
    k = (n - 1) // config.ttur
    teacher = nets.guided_teacher
    if k < K:  # DynaDG
        teacher = guided(real_score(fake, config.real_scale * c_at(k, K)), nets.null, config.guidance)
    rewarded = config.reward_weight and k >= config.reward_start * K
    if rewarded:
        nets.pace(batch.loop, 0.5)
    grpo = rewarded and moves_G and config.rl == "grpo"
    renoised = config.dm_input == "renoised" and len(S) > 1
    i = dmd.student_step(S, config.dm_steps, config.seed, batch.loop)
    low, high = config.renoise
    loss_G = 0.0
    made = []  # of each micro-batch: the clean estimate for Eq. 6, and the random generators of its rollout
    parts = micro_batches(policy.grouped(batch, config.candidates) if grpo else batch, config.micro_batch)

    for b in parts:
        rng = b.generators("rollout")
        z = randn(rng, nets.like(b))
        if grpo:
            states = policy.simulate(G, z, b.c, S, rng)  # one simulation for DM and RL
            x_tau = states[i]
        else:
            x_tau = backward_simulation(G, z, b.c, S, rng, 0, i)  # line 8
        x, first = estimates(G, x_tau, S[i], b.c, rng, moves_G, renoised)  # line 10
        if moves_G:
            rng_t = b.generators("renoise")
            t = schedule.t_at(low + (high - low) * noise_level(rng_t, k, K, x.device))  # DynaRS
            eps = randn(rng_t, x)
            L = L_dmd = dmd.loss(x, dmd.gradient(teacher, fake, x, t, eps, b.c))  # Eq. 4
            logged.add(b.weight, dm_loss=L_dmd)
            if rewarded and not grpo:
                L_reward, scores = reward_loss(reward_at(nets, b, i, eps), x, config.reward_margin)
                L = L_dmd + config.reward_weight * L_reward
                logged.add(b.weight, reward=scores.mean())
            (b.weight * L).backward()
            loss_G += b.weight * L.detach()
        if grpo:
            L_rl, seen = reinforce(nets, b, states)
            loss_G += b.weight * L_rl
            logged.add(b.weight, **seen)
        made.append((first, rng))

    if moves_G:  # lines 17-18
        logged["g_norm"], moved = nets.step("G", loss_G, config.clip_grad)
        if moved:
            score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema)  # Eq. 11; λ = 1 with a LoRA

    drawn = []  # of each micro-batch: t and ε of Eq. 6
    for b, (x, _) in zip(parts, made):  # lines 20-23
        rng_t = b.generators("fake")
        t = schedule.t_at(noise_level(rng_t, k, K, x.device))  # DynaRS
        eps = randn(rng_t, x)
        L_fake = score_estimator.loss(fake, x, t, eps, b.c)  # Eq. 6
        (b.weight * L_fake).backward()
        logged.add(b.weight, fake_loss=L_fake)
        drawn.append((t, eps))
    logged["fake_norm"], _ = nets.step("fake", logged["fake_loss"], config.clip_grad)  # line 24

    if batch.watched:
        for b, (x, rng), (t, eps) in zip(parts, made, drawn):
            x_0 = monitor.finish(G, x, i, b.c, S, rng)
            logged.add(b.weight, **monitor.health(nets, b, x_0, logged["fake_loss"], t, eps))
    return logged
