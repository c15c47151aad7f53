"""DMDR, "Distribution Matching Distillation Meets Reinforcement Learning" (Jiang et al., 2025): what it adds to DMD.

    c_k      (1 + cos(π min(k/K, 1)))/2                 cold start: 1 at the first generator update, 0 from the K-th on
    DynaDG   μ_fake = teacher + 2 ΔW,  μ_real = teacher + r_0 c_k ΔW       one network, one LoRA ΔW, two scales
    DynaRS   t = t(u),   u ~ Beta(1 + 3 c_k, 1 + c_k/2)                    renoise times: high noise first, then uniform
    RL       L = L_DMD + w E max(0, m - R(x_s))         from update K on; gradient through the one step x = G_θ(x_τ, τ)

    k        generator updates so far;  K, r_0, w, m: --dynamic, --real-scale, --reward-weight, --reward-margin
    x_s      x noised to the next student step s, for the latent reward model; x itself for a reward of pictures.
             The last step has no next: s is that step itself, and with one step t = 1

The target of distillation starts near the student and moves to the teacher. The reward loss starts once the two are
close; from then on the learning rates are halved. The schedules are those of the authors' public demo, which is
one-step and flow-based.
ASSUMPTION: w and m; only their ranges are known. r_0 is the one-step demo's, 0.75 (0.5 is reported for SD3).
NOTE: t(u) is the schedule's, at eps-prediction too. The DM loss maps u into --renoise, Eq. 6 does not. The teacher is
guided, also while its LoRA is on. x_s takes the DM loss's noise.
Left out: GRPO and DPO, which the paper names beside the back-propagated reward; their losses are not public.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

import dmd
import score_estimator
from diffusion import add_noise, backward_simulation, guided, rand, randn, times
from engine import metrics, monitor
from engine.batch import micro_batches
from engine.config import Config
from engine.errors import UserError
from engine.models import add_lora
from engine.run_folder import reward_folder

FAKE_SCALE = 2.0  # of ΔW in μ_fake


@dataclass
class Settings(Config):
    """DMDR's flags, and its values of the common ones."""

    method: str = "dmdr"
    dm_steps: str = "all"
    ttur: int = 5
    ema: float = 1.0
    gan_weight: float = 0.0
    fake_lora: int = 16  # rank of the LoRA that makes the teacher the score estimator; 0 = a copy of its own
    dynamic: int = 100  # K, generator updates of the cold start (DynaDG, DynaRS); 0 = none. Needs --fake-lora
    real_scale: float = 0.75  # r_0, the LoRA's scale in the real score at the start
    reward_weight: float = 0.1  # w, weight of the reward loss beside the DM loss, after the cold start; 0 = none
    reward_margin: float = 8.0  # m, the score above which the reward loss is 0

    def check(self):
        super().check()
        for name in ("fake_lora", "dynamic", "reward_weight"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        if self.gan_weight:
            raise UserError("--method dmdr has no GAN: leave --gan-weight out")
        if self.dynamic and not (self.fake_lora or self.lora_rank):
            raise UserError("--dynamic needs --fake-lora: DynaDG scales the score estimator's LoRA")
        if self.fake_lora and not self.lora_rank and self.ema < 1:
            raise UserError("--fake-lora needs --ema 1: Eq. 11 pulls whole weights, not a LoRA's")
        if self.reward_weight and self.reward != "clip" and not self.dry_run:
            reward_folder(self)


# -------------------------------------------------------------------------------- its schedules and reward


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


def reward_loss(reward, x, margin):
    """E max(0, m - R(x)) -> scalar, scores (B,).

    x (B, C, h, w) with gradient; reward: x -> scores (B,), differentiable.
    """
    scores = reward(x)
    return (margin - scores).clamp(min=0).mean(), scores.detach()


def reward_at(nets, batch, i, eps):
    """R as a function of the clean estimate x at student step i: CLIP's score of the picture, or the reward model's.

    The latent reward model sees x noised by eps to the next student step (from the last one, to the last one).
    ASSUMPTION: with one step, whose noise hides x, it sees x at t = 1, where it scores finished latents.
    """
    if nets.config.reward == "clip":
        return lambda x: nets.R.score(nets.R.features(nets.vae.decode(x)), batch.prompts)
    S = nets.S
    s = times(S[min(i + 1, len(S) - 1)] if len(S) > 1 else torch.ones_like(S[0]), eps)
    c_R = nets.R.encoder.encode(batch.prompts)
    return lambda x: nets.R(add_noise(nets.G.schedule, x, s, eps), s, c_R)


# ------------------------------------------------------------------------------------------ the method


def prepare(nets):
    """Makes the score estimator a LoRA on the frozen teacher's weights, and loads the reward model."""
    config = nets.config
    fake = nets.fake
    if config.lora_rank:  # the score estimator is a LoRA already
        fake.scales = fake.scales | {"fake": FAKE_SCALE}
    elif config.fake_lora:
        add_lora(fake.net, config.fake_lora, "fake", dtype=nets.dtype)
        fake.scales = {"fake": FAKE_SCALE}
    if config.reward_weight and config.stage == 1:  # stage 2 loads its own
        nets.R = metrics.Clip(config.clip, nets.latent.device) if config.reward == "clip" else nets.load_reward()


def iterate(nets, batch, n):
    """The n-th loop of DMDR: lines 5-24 of Algorithm 1 with DynaDG, DynaRS and the reward -> {name: value} to log."""
    config, G, fake, S = nets.config, nets.G, nets.fake, nets.S
    schedule = G.schedule
    K = config.dynamic
    parts = micro_batches(batch, config.micro_batch)
    logged = monitor.Means()
    moves_G = n % config.ttur == 0  # line 12
    k = (n - 1) // config.ttur
    teacher = nets.guided_teacher
    if k < K:  # DynaDG
        teacher = guided(real_score(fake, config.real_scale * c_at(k, K)), nets.null, config.guidance)
    rewarded = config.reward_weight and k >= K
    if rewarded:
        nets.pace(batch.loop, 0.5)
    i = dmd.student_step(S, config.dm_steps, config.seed, batch.loop)
    low, high = config.renoise
    loss_G = 0.0
    made = []  # of each micro-batch: x, and the random generators of its rollout

    for b in parts:
        rng = b.generators("rollout")
        z = randn(rng, nets.like(b))
        x_tau = backward_simulation(G, z, b.c, S, rng, 0, i)  # line 8
        with torch.set_grad_enabled(moves_G):
            x = G(x_tau, times(S[i], x_tau), b.c)  # line 10
        if moves_G:
            rng_t = b.generators("renoise")
            t = schedule.t_at(low + (high - low) * noise_level(rng_t, k, K, x.device))  # DynaRS
            eps = randn(rng_t, x)
            L = L_dmd = dmd.loss(x, dmd.gradient(teacher, fake, x, t, eps, b.c))  # Eq. 4
            logged.add(b.weight, dm_loss=L_dmd)
            if rewarded:
                L_reward, scores = reward_loss(reward_at(nets, b, i, eps), x, config.reward_margin)
                L = L_dmd + config.reward_weight * L_reward
                logged.add(b.weight, reward=scores.mean())
            (b.weight * L).backward()
            loss_G += b.weight * L.detach()
        made.append((x.detach(), rng))

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
