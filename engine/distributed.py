"""Processes and ranks, sharding, and an optimizer step that all ranks take or skip together."""

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from engine.base_model import family_of_net
from engine.errors import UserError
from engine.quantize import in_8_bits
from engine.stopping import SIGNALS


def start_process():
    """Make the process group where there are several ranks or a GPU -> rank, ranks, device."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if (ranks > 1 or cuda) and not dist.is_initialized():
        store = dist.HashStore()  # without torchrun there is no rendezvous
        rank = 0
        if ranks > 1:
            meeting, rank, _ = next(rendezvous("env://"))
            # torchrun's store survives restarts: without a prefix a new rank could find a dead rank's address in it
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", meeting)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
    return int(os.environ.get("RANK", 0)), ranks, device


def rank_and_ranks():
    """This process's rank, and how many there are: (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave(status=0):
    """End the process with this status: the last line of a program.

    With a process group Python's shutdown is skipped. Gloo's threads outlive destroy_process_group, because DTensor's
    caches hold the group, and a thread that frees a tensor during shutdown aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def from_rank_0(function):
    """Call function() on rank 0 alone -> its result, on every rank. Its UserError is raised on every rank."""
    answer = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = function()
        except UserError as e:
            answer[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def together(function):
    """Call function() on every rank -> its result. The first UserError of any rank is raised on every rank."""
    result = error = None
    try:
        result = function()
    except UserError as e:
        error = str(e)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise UserError(error)
    return result


def gathered(found):
    """The union of every rank's dict, on every rank."""
    if not dist.is_initialized():
        return found
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def total(value):
    """The sum of a tensor over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def barrier():
    """Wait for all ranks; without a process group, for the GPU."""
    if dist.is_initialized():
        dist.barrier()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


class Ending:
    """Ctrl-C or SIGTERM to any rank ends a run after the loop in hand: all ranks save and leave together.

    A second Ctrl-C, which torchrun passes on as SIGTERM, ends the process at once. SIGTERM may come twice: a cluster
    sends it to torchrun, which passes it on, and to its ranks.
    """

    def __init__(self, device):
        self.heard = False
        self.device = device
        self.process = os.getpid()
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python sets handlers there only
            self.before = {number: signal.signal(number, self.hear) for number in SIGNALS}

    def hear(self, number, _):
        self.heard = True
        for other in SIGNALS if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(other, signal.SIG_DFL)
        if int(os.environ.get("RANK", 0)) == 0 and os.getpid() == self.process:  # loader processes hear it too
            os.write(2, b"\rstopping after this loop; Ctrl-C again leaves at once ")

    def asked(self):
        """Whether a rank got a signal, the same answer on all. A later one counts at the next call."""
        flag = torch.tensor(float(self.heard), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def close(self):
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def adamw(parameters, lr, config):
    """AdamW over a list of parameters, or torchao's with 8-bit moments. Raises UserError where torchao is missing."""
    settings = {"lr": lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **settings)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as e:
        raise UserError(f"--optimizer adamw8bit needs the package torchao (pip install torchao): {e}") from None
    return AdamW8bit(parameters, **settings)


def weights(optimizer):
    """What an optimizer trains, in the order of the network's parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def update(optimizer, loss, max_norm=float("inf")):
    """One optimizer step, skipped where the loss or a gradient is not finite -> (gradient norm, whether it stepped)."""
    for p in weights(optimizer):  # what nothing comes after has none; AdamW's state of it is saved like the others'
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = nn.utils.clip_grad_norm_(weights(optimizer), max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
    if dist.is_initialized():  # all ranks skip, or none
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, bool(finite)


def average_gradients(module, ranks):
    """In place: the ranks' mean gradient, for a small network that every rank holds whole."""
    if ranks > 1:
        for p in module.parameters():
            if p.requires_grad:
                dist.all_reduce(p.grad)
                p.grad /= ranks


def shard(net, dtype):
    """FSDP2, in place: weights, fp32 gradients and optimizer states are sharded over all ranks -> the network.

    The network computes in `dtype`. On one GPU frozen weights stay as they are: FSDP2 would copy them in each pass.
    """
    # Inputs are not cast: bf16 would round t.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = {"mp_policy": policy, "reshard_after_forward": True}  # Eq. 11 reads the shards after a forward pass
    weights, alone = set(net.parameters()), dist.get_world_size() == 1
    settings["ignored_params"] = {p for p in weights if in_8_bits(p) or (alone and not p.requires_grad)}
    if settings["ignored_params"] == weights:
        return net
    for block in family_of_net(net).blocks(net):
        fully_shard(block, **settings)
    return fully_shard(net, **settings)
