"""DMD2's adversarial pair, the baseline that Flash-DMD replaces (Flash-DMD 3.1, 3.2; Eq. 5 and 7): a discriminator of NOISY LATENTS.

    Eq. 5   ∇_θ L_advG = E [ log D(x_t) dG/dθ ]                          x = G_θ(x_τ, τ), x_t = α_t x + σ_t ε
    Eq. 7   ∇_ψ L_advD = E [ P(x_real) - P(x) ],   P(y) = log D(y_t) dD/dψ

    D    the first half of the score estimator μ_ψ (down and mid blocks), then a small head with one logit
    ψ    trained by Eq. 6 AND Eq. 7: the double role that Flash-DMD's section 3.2 blames for DMD2's five updates per generator update

NOTE: the paper prints ascent directions, and Eq. 7's second term as -log D(x); these are the logistic losses they stand for.
NOTE: Eq. 5 takes t from --renoise, as the DM loss does, and Eq. 7 from the whole range, as Eq. 6 does: they share those passes' noise.
ASSUMPTION: the head (strided convolutions, group norm, SiLU) is ours; DMD2's paper says only that it sits on the bottleneck.
Left out: everything but the two losses; `--preset dmd2` is the method, and train.py the order of events.
"""

import torch.nn.functional as F
from torch import nn

from diffusion import add_noise


class Head(nn.Module):
    """Bottleneck features (B, C, h, w) -> one logit per sample, (B,)."""

    def __init__(self, channels):
        super().__init__()
        layers = []
        for stride in (2, 2):
            layers += [nn.Conv2d(channels, channels, 3, stride, 1), nn.GroupNorm(8, channels), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))

    def forward(self, features):
        return self.net(features.to(self.net[-1].weight.dtype)).squeeze(1)


def generator_loss(fake, head, x, t, eps, c):
    """Eq. 5: E -log D(x_t), D the sigmoid of head(bottleneck of μ_ψ(x_t, t)). x (B, C, h, w) with gradient; t (B,). Scalar.

    Its gradient reaches ψ and the head too: the caller drops it there.
    """
    _, features = fake.with_features(add_noise(fake.schedule, x, t, eps), t, c)
    return F.softplus(-head(features)).mean()


def discriminator_loss(fake, head, x, x_real, t, eps, c):
    """Eq. 7: E -log D(x_real_t) + E -log(1 - D(x_t)), both latents at the same t with the same noise, x detached.

    x, x_real (B, C, h, w). Returns (scalar, the share of latents judged right).
    """
    real, made = (head(fake.with_features(add_noise(fake.schedule, y, t, eps), t, c)[1]) for y in (x_real, x))
    right = (real > 0).float().mean() / 2 + (made <= 0).float().mean() / 2
    return F.softplus(-real).mean() + F.softplus(made).mean(), right
