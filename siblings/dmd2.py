"""DMD2, Flash-DMD's baseline (Flash-DMD 3.1, 3.2; Eq. 5 and 7): its discriminator sees NOISY LATENTS.

    Eq. 5   ∇_θ L_advG = E [ log D(x_t) dG/dθ ]                     x = G_θ(x_τ, τ), x_t = α_t x + σ_t ε
    Eq. 7   ∇_ψ L_advD = E [ P(x_real) - P(x) ],   P(y) = log D(y_t) dD/dψ

    D    the first half of the score estimator μ_ψ (a UNet's down and mid blocks, the first half of a transformer's
         blocks), then a small head with one logit
    ψ    trained by Eq. 6 AND Eq. 7: the double role that Flash-DMD (3.2) blames for DMD2's TTUR of 5

As the paper describes it (3.1, 3.2): DM loss at every student step, TTUR 5, no EMA pull. The GAN weights are DMD2's.
NOTE: the paper prints ascent directions, and Eq. 7's second term as -log D(x). They stand for the logistic losses here.
NOTE: Eq. 5 uses the DM loss's t (from --renoise) and noise; Eq. 7 uses Eq. 6's t (from the whole range) and noise.
NOTE: DMD2's code clips the gradients of ψ and head together; here ψ's alone are clipped.
ASSUMPTION: the paper says only where the head sits. --head published is that of DMD2's code, for SDXL at 1024; the
default, which fits features of any size, is ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import dmd
import score_estimator
from diffusion import add_noise, backward_simulation, randn, times
from engine import monitor
from engine.batch import micro_batches
from engine.config import Config
from engine.errors import UserError
from engine.hidden import block_name, map_shape


@dataclass
class Settings(Config):
    """DMD2's flags, and its values of the common ones."""

    method: str = "dmd2"
    dm_steps: str = "all"
    ttur: int = 5
    ema: float = 1.0
    gan_weight: float = 5e-3
    critic_weight: float = 0.01  # weight of Eq. 7 beside Eq. 6, as in DMD2
    head: str = "scaled"  # D's head: scaled = to the size of the features; published = DMD2's, for 32 x 32; map = local
    d_block: str = "middle"  # the score estimator's block whose features D reads: middle, or last

    def check(self):
        super().check()
        self.require("critic_weight", self.critic_weight >= 0, "must not be negative")
        if self.prompts and self.gan_weight:
            why = "D reads the prompt, and would be told another picture's"
            raise UserError(f"--prompts and --method {self.method} exclude each other: {why} (--gan-weight 0: no D)")
        if self.compile and self.gan_weight:
            raise UserError(
                f"--compile and --method {self.method} exclude each other: a compiled network hides its features"
            )


# ----------------------------------------------------------------------------------- Eq. 5 and 7


class Head(nn.Module):
    """Features (B, C, h, h) -> one logit per sample, (B,)."""

    def __init__(self, channels, side, kind="scaled"):
        """channels, side: C and h. kind: "scaled" halves the map until one position is left; "published" is DMD2's;
        "map" gives each position a logit, and their mean.

        Raises UserError for a "published" head on a map of another size than DMD2's.
        """
        super().__init__()
        layers = []
        if kind == "published":
            if side != 32 or channels % 32:
                here = f"{channels} x {side} x {side}"
                raise UserError(f"--head published is for maps of 32 x 32, the features are {here}: use --head scaled")
            for stride, padding in ((2, 1), (2, 1), (2, 1), (4, 0)):
                layers += [nn.Conv2d(channels, channels, 4, stride, padding), nn.GroupNorm(32, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, 1, 1), nn.Flatten()]
        elif kind == "map":
            layers = [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            for _ in range((side - 1).bit_length()):
                layers += [nn.Conv2d(channels, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, features):
        return self.net(features.to(next(self.parameters()).dtype)).squeeze(1)


def generator_loss(fake, head, x, t, eps, c):
    """Eq. 5: E -log D(x_t), D the sigmoid of head(features of μ_ψ(x_t, t)). Scalar.

    x (B, C, h, w) with gradient; t (B,); eps as x. The gradient reaches ψ and the head too: the caller drops it there.
    """
    _, features = fake.with_features(add_noise(fake.schedule, x, t, eps), t, c)
    return F.softplus(-head(features)).mean()


def discriminator_loss(fake, head, x, x_real, t, eps, c):
    """Eq. 7: E -log D(x_real_t) + E -log(1 - D(x_t)), both latents at the same t with the same noise.

    x, detached, and x_real (B, C, h, w); t (B,). Returns the loss, a scalar, and the accuracy: the fraction of latents
    classified right, 0.5 = chance.
    """
    real, made = (head(fake.with_features(add_noise(fake.schedule, y, t, eps), t, c)[1]) for y in (x_real, x))
    accuracy = (real > 0).float().mean() / 2 + (made <= 0).float().mean() / 2
    return F.softplus(-real).mean() + F.softplus(made).mean(), accuracy


# ------------------------------------------------------------------------------------ the method


def prepare(nets):
    """Adds D's head, trained at the score estimator's rate. Raises UserError where --head does not fit the model."""
    config = nets.config
    if config.gan_weight:
        torch.manual_seed(config.seed)
        nets.D = nets.add("head", new_head(nets, nets.fake, config.head, config.d_block), config.fake_lr)


def new_head(nets, fake, kind, where):
    """A head for the features of a score estimator, which shows those of its middle or last block from now on."""
    fake.block = block_name(fake.net, where)
    return Head(*map_shape(fake.net, nets.latent.shape[-1], where), kind)


def iterate(nets, batch, n):
    """The n-th loop of DMD2: lines 5-26 of Algorithm 1, Eq. 5 and 7 in place of Pixel-GAN -> {name: value} to log."""
    config, G, fake, D, S = nets.config, nets.G, nets.fake, nets.D, nets.S
    parts = micro_batches(batch, config.micro_batch)
    logged = monitor.Means()
    moves_G = n % config.ttur == 0  # line 12
    i = dmd.student_step(S, config.dm_steps, config.seed, batch.loop)
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
            t = dmd.renoise_time(G.schedule, config.renoise, rng_t, x.device)
            eps = randn(rng_t, x)
            L = L_dmd = dmd.loss(x, dmd.gradient(nets.guided_teacher, fake, x, t, eps, b.c))  # Eq. 4
            logged.add(b.weight, dm_loss=L_dmd)
            if D is not None:
                L_adv = generator_loss(fake, D, x, t, eps, b.c)  # Eq. 5
                L = L_dmd + config.gan_weight * L_adv
                logged.add(b.weight, adv_loss=L_adv)
            (b.weight * L).backward()
            loss_G += b.weight * L.detach()
            if D is not None:  # Eq. 5 trains G alone
                nets.forget("fake")
                nets.forget("head")
        made.append((x.detach(), rng))

    if moves_G:  # lines 17-18
        logged["g_norm"], moved = nets.step("G", loss_G, config.clip_grad)
        if moved:
            score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema)  # Eq. 11

    for b, (x, _) in zip(parts, made):  # lines 20-23
        t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)
        L = L_fake = score_estimator.loss(fake, x, t, eps, b.c)  # Eq. 6
        logged.add(b.weight, fake_loss=L_fake)
        if D is not None:
            L_D, accuracy = discriminator_loss(fake, D, x, nets.latents(b.x_real), t, eps, b.c)  # Eq. 7
            L = L_fake + config.critic_weight * L_D
            logged.add(b.weight, d_loss=L_D, d_accuracy=accuracy)
        (b.weight * L).backward()
    logged["fake_norm"], _ = nets.step("fake", logged["fake_loss"], config.clip_grad)  # line 24
    if D is not None:
        nets.step("head", logged["d_loss"])

    if batch.watched:
        for b, (x, rng) in zip(parts, made):
            t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)
            x_0 = monitor.finish(G, x, i, b.c, S, rng)
            logged.add(b.weight, **monitor.health(nets, b, x_0, logged["fake_loss"], t, eps))
    return logged
