"""What a denoiser's blocks give, as maps, for latent discriminators (siblings/dmd2.py).

A block has its module's name: "mid_block", "up_blocks.0" of a UNet, "transformer_blocks.11" of a transformer.
"""

from contextlib import contextmanager

from diffusers import SD3Transformer2DModel


def block_name(net, where="middle"):
    """The name of a network's middle or last block: of a UNet's the mid block or the last up block.

    ASSUMPTION: in a transformer of n blocks the (n + 1)//2-th stands for a UNet's mid block, which DMD2's D reads.
    """
    if isinstance(net, SD3Transformer2DModel):
        last = len(net.transformer_blocks) - 1
        return f"transformer_blocks.{last if where == 'last' else last // 2}"
    return f"up_blocks.{len(net.up_blocks) - 1}" if where == "last" else "mid_block"


def map_shape(net, side, where="middle"):
    """The width and the side of that block's map, where latents have this side."""
    if isinstance(net, SD3Transformer2DModel):
        return net.inner_dim, side // net.config.patch_size
    widths = net.config.block_out_channels
    return (widths[0], side) if where == "last" else (widths[-1], side >> (len(widths) - 1))


@contextmanager
def output_of(net, name):
    """A list that gets the output of a block when the network is called in this `with`.

    The backward pass comes after it: checkpointing calls the block again there.
    """
    outputs = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def as_map(net, output, side):
    """A block's output -> a map (B, D, h', w'). side: the height of the network's input.

    A UNet's down block gives its skip connections beside it, a transformer's block text tokens and picture tokens.
    """
    if isinstance(net, SD3Transformer2DModel):
        _, tokens = output  # (B, n, D), row by row
        return tokens.transpose(1, 2).unflatten(2, (side // net.config.patch_size, -1))
    return output[0] if isinstance(output, tuple) else output
