"""--quantize-frozen int8: the linear layers of a frozen network in 8 bits, by torchao, a scale for each row of weights.

Such a weight is read in 8 bits and multiplied in the type that the network computes in; gradients pass through it to
its input. FSDP2 does not shard it: every GPU holds it whole.
"""

from torch import nn

from engine.errors import UserError


def int8(net):
    """In place: every linear layer of a network in 8 bits. Raises UserError where torchao cannot be imported."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as e:
        raise UserError(f"--quantize-frozen int8 needs the package torchao (pip install torchao): {e}") from None
    quantize_(net, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))


def in_8_bits(p):
    """Whether a parameter is such a weight."""
    return type(p.data).__module__.startswith("torchao")
