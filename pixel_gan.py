"""Pixel-GAN (Flash-DMD 3.3; Eq. 9 and 10): a discriminator on the features of a frozen SAM image encoder.

    Eq. 9    ∇_θ L_advG = E [ log D(V(G_θ(x̂, t̂))) dG/dθ ]
    Eq. 10   L_advD = E_real [ -log D(x_real) ] + E [ -log(1 - D(V(x_adv))) ]

    D      SAM encoder (frozen) -> a small head per feature level (ω, trained) -> maps of logits
    V      VAE decoder (frozen)
    x_adv  the generator's clean estimate at the last student step, which by default this loss alone trains

NOTE: the paper prints Eq. 9 as an ascent direction, and the second term of Eq. 10 as +log D(fake). kind =
"logistic" is what they stand for; the default, "hinge", is the pair of Algorithm 1, line 25.
ASSUMPTION: D sees no prompt (the paper names none). Heads: spectral-norm convolutions, group norm, leaky ReLU, a logit
MAP per level, after the 2-D heads that the paper takes from ADM; their sizes are ours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from diffusion import backward_simulation, noise_to_step

SAM_MEAN = (123.675, 116.28, 103.53)  # of pixels in 0 .. 255, as SAM was trained
SAM_STD = (58.395, 57.12, 57.375)


class PixelDiscriminator(nn.Module):
    """D(D.features(images)): images (B, 3, H, W) in [-1, 1] -> logits (B, n), the flattened maps of all levels.

    encoder: segment_anything's ImageEncoderViT, frozen; gradient passes through it to the image. Features are taken
    after each block with global attention, and from the neck.
    """

    def __init__(self, encoder, width=64, checkpointing=False):
        """checkpointing: recompute SAM's activations in the backward pass."""
        super().__init__()
        self.checkpointing = checkpointing
        self.encoder = [encoder]  # in a list: frozen, so not among this module's parameters or its state
        dim = encoder.patch_embed.proj.out_channels
        out = encoder.neck[0].out_channels
        self.levels = [i for i, block in enumerate(encoder.blocks) if block.window_size == 0]
        self.heads = nn.ModuleList(head(channels, width) for channels in [dim] * len(self.levels) + [out])

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> SAM's feature maps, one (B, C_l, h, w) per level, in the images' dtype.

        SAM computes in its own dtype.
        """
        (encoder,) = self.encoder
        x = encoder.patch_embed(sam_input(images, encoder.img_size).to(encoder.patch_embed.proj.weight.dtype))
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        maps = []
        for i, block in enumerate(encoder.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)  # (B, h, w, C)
            if i in self.levels:
                maps.append(x.permute(0, 3, 1, 2))
        return [m.to(images.dtype) for m in (*maps, encoder.neck(x.permute(0, 3, 1, 2)))]

    def forward(self, features):
        """Feature maps -> logits (B, n). `features` is a separate call: a picture used twice passes SAM once."""
        return torch.cat([h(f).flatten(1) for h, f in zip(self.heads, features)], 1)


def head(channels, width):
    """A 2-D head: features (B, channels, h, w) -> a map of logits (B, 1, h, w)."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, width, 3, padding=1)),
        nn.GroupNorm(8, width),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
        nn.GroupNorm(8, width),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )


def sam_input(images, size):
    """Images in [-1, 1] -> SAM's normalised pixels at its own square resolution; not clamped, with gradient."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (SAM_MEAN, SAM_STD))
    return ((images + 1) * 127.5 - mean) / std


# ------------------------------------------------------------------------------ what D sees in a loop


def window(crop, latent, factor, seed, loop):
    """What D sees in a loop, a random square of `crop` pixels (0 = all) -> indices into latents, and into pixels.

    latent: (..., h, w), for its size; factor: pixels per latent. The square is the same in real and generated pictures.
    """
    side = latent.shape[-1]
    size = crop // factor or side
    top, left = (int(v) for v in np.random.default_rng([seed, loop, 1]).integers(side - size + 1, size=2))
    latents = (..., slice(top, top + size), slice(left, left + size))
    pixels = (..., slice(top * factor, (top + size) * factor), slice(left * factor, (left + size) * factor))
    return latents, pixels


def last_input(G, x_tau, x, c, S, i, generators, reading):
    """G's input at the last student step, for x_adv (Algorithm 1, lines 9 and 11). No gradient (Eq. 8's Detach).

    x_tau (B, C, h, w): G's input at student step i; x = G(x_tau, S[i]), detached; generators: those of the rollout.
    reading "b": the rollout's input at the last step, exactly as in sampling (Algorithm 1, lines 9-15).
    reading "a": x_0 of the finished rollout, noised to the last step (Eq. 8, 9).
    NOTE: the paper has both; results/stage1.md compares them.
    At i, the last step, as always with one step, reading "b" gives x_tau: x_adv is x.
    """
    last = len(S) - 1
    if i == last:
        x_last = x_tau
    else:
        x_next = noise_to_step(G.schedule, x, S, i + 1, generators)
        x_last = backward_simulation(G, x_next, c, S, generators, i + 1, last)
    if reading == "b":
        return x_last
    x_0 = backward_simulation(G, x_last, c, S, generators, last)
    return noise_to_step(G.schedule, x_0, S, last, generators)


# ---------------------------------------------------------------------------------------------- the losses


def generator_loss(fake_logits, kind="hinge"):
    """Eq. 9: -E log D(V(x_adv)) for "logistic" (D the sigmoid of the logit); -E logit for "hinge". Scalar."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits, kind="hinge"):
    """Eq. 10. Scalar.

    "logistic": E[-log D(real)] + E[-log(1 - D(fake))]; "hinge": E[(1 - real)+] + E[(1 + fake)+].
    """
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def accuracy(real_logits, fake_logits):
    """The fraction of pictures that D classifies right by their mean logit: 0.5 = chance, 1 = all of them. Scalar."""
    right = torch.cat([real_logits.mean(1) > 0, fake_logits.mean(1) <= 0])
    return right.float().mean()
