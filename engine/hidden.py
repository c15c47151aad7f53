"""What a denoiser's blocks give, as maps, for latent discriminators (siblings/dmd2.py).

A block has its module's name: "mid_block", "up_blocks.0" of a UNet, "transformer_blocks.11" of a transformer.
"""

from contextlib import contextmanager

from engine.base_model import family_of_net


def block_name(net, where="middle"):
    """The name of a network's middle or last block: of a UNet's the mid block or the last up block."""
    return family_of_net(net).block_name(net, where)


def map_shape(net, side, where="middle"):
    """The width and the side of that block's map, where latents have this side."""
    return family_of_net(net).map_shape(net, side, where)


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
