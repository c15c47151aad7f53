"""Qwen-Image's VAE, of films, for single pictures: AutoencoderKL's interface, with gradient.

Its causal convolutions see a picture behind frames of zeros. So the last slice of a kernel in time is all that counts:
a convolution in two dimensions, the same numbers at half the cost. Its own `decode` clamps, where gradients end.
"""

from functools import partial
from types import SimpleNamespace

import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResidualBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


class OneFrame(nn.Module):
    """encode(images).latent_dist.mean and decode(z)[0] of images (B, 3, H, W) and latents (B, C, h, w)."""

    def __init__(self, net):
        """net: an AutoencoderKLQwenImage, changed in place; its weights stay as they are."""
        super().__init__()
        self.net = net
        config = net.config
        self.config = FrozenDict(
            latent_channels=config.z_dim,
            block_out_channels=config.dim_mult,  # only their number is used
            latents_mean=config.latents_mean,
            latents_std=config.latents_std,
            scaling_factor=1.0,
        )
        for module in net.modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.forward = partial(in_one_frame, module)

    def encode(self, images):
        moments = self.net.quant_conv(self.net.encoder(images[:, :, None]))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=moments[:, : self.config.latent_channels, 0]))

    def decode(self, z, return_dict=False):
        return (self.net.decoder(self.net.post_quant_conv(z[:, :, None]))[:, :, 0],)

    def enable_gradient_checkpointing(self):
        """Recompute the decoder's residual blocks in the backward pass."""
        for module in self.net.decoder.modules():
            if isinstance(module, QwenImageResidualBlock):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def in_one_frame(conv, x):
    """A causal convolution of a single frame. x (B, C, 1, h, w)."""
    left, _, top, *_ = conv._padding
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left))[:, :, None]
