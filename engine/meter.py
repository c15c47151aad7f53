"""What a run of PyTorch code allocates and computes, counted operation by operation; also on fake tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors (`live` now, `peak` so far) and floating-point operations."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known = set()  # ids of the storages that live
        self.turns = {}  # name -> (peak, operations)

    def turn(self, name):
        """Keep the peak and the operations so far under `name`, and begin the next turn."""
        self.turns[name] = self.peak, self.flops
        self.peak = self.live
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        new = {name: storage for name, storage in storages(out).items() if name not in self.known}
        for name in new.keys() - storages((args, kwargs)).keys() if new else ():
            self._born(name, new[name])
        self.peak = max(self.peak, self.live)
        return out

    def _born(self, name, storage):
        size = storage.nbytes()
        self.live += size
        self.known.add(name)
        weakref.finalize(storage, self._died, name, size)

    def _died(self, name, size):
        self.live -= size
        self.known.discard(name)


def storages(tree):
    """{id: storage} of the tensors in nested arguments."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return {id(s): s for s in (t.untyped_storage() for t in tensors)}
