"""SDXL at 1024 without weights: one iteration of each stage on fake tensors (shapes and dtypes, no numbers), and what it would need."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

import dry_run
import train
from config import parse
from diffusion import sample_generators
from models import load_denoiser

B = 2


@pytest.mark.parametrize("preset", ["sdxl-4step", "sdxl-stage2", "sd3-4step"])
def test_iteration_at_full_size(preset, monkeypatch):
    """SDXL's UNets in bf16, or two LoRAs on SD3's transformer, the VAE, SAM ViT-B: no shape or dtype clashes, and every weight
    that a player trains gets a gradient of its own shape."""
    lacking, config = {}, parse(["--preset", preset])
    lora = {"G": ".student.", "fake": ".fake."} if config.lora_rank else {}

    def update(cast, name, loss, max_norm=None):
        module = cast.players[name][0]
        trained = [(k, p) for k, p in module.named_parameters() if p.requires_grad and lora.get(name, "") in k]
        lacking[name] = [k for k, p in trained if p.grad is None or (p.grad.shape, p.grad.dtype) != (p.shape, p.dtype)]
        assert trained
        module.zero_grad(set_to_none=True)
        return loss.detach(), True

    monkeypatch.setattr(dry_run.Unmoved, "update", update)
    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", lambda *a: None)  # keep the gradients, to look at them
    draw = lambda purpose: sample_generators(0, 1, range(B), purpose)  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True):
        cast = dry_run.assemble(config, B)
        c = cast.encoder.encode(["a", "b"])
        if config.stage == 1:
            pictures = torch.empty(B, 3, 1024, 1024)
            logged, stepped, ok = train.distil(cast, config.ttur, pictures, ["a", "b"], c, draw, watched=False)
            assert {"dm_loss", "adv_loss", "fake_loss", "d_loss"} <= set(logged) and lacking == {"G": [], "fake": [], "D": []}
        else:
            logged, stepped, ok = train.prefer(cast, ["a", "b"], c, draw)
            assert logged["rl_loss"].shape == () and lacking == {"G, RL": []}
    assert stepped and ok


def test_memory_follows_storages():
    """By hand: of a chain of four products y = x w, of 4,000 bytes each, autograd keeps every input beside the last output; without it two live."""
    w = torch.ones(1000, requires_grad=True)

    def chain():
        x = torch.zeros(1000)
        for _ in range(4):
            x = x * w
        return x

    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            with dry_run.Memory() as with_graph:
                y = chain()
            assert with_graph.live == with_graph.peak == 5 * 4000
            del y
            assert with_graph.live == 0
            with dry_run.Memory() as without, torch.no_grad():
                y = chain()
            assert y.shape == (1000,) and (without.live, without.peak) == (4000, 2 * 4000)


def test_memory_is_the_same_on_fake_tensors():
    """A step of the toy's UNet, forward and backward: what lives at the peak on real tensors, and on fake ones."""
    c = {"encoder_hidden_states": torch.zeros(2, 32, 256), "added_cond_kwargs": {"text_embeds": torch.zeros(2, 64), "time_ids": torch.zeros(2, 6)}}
    config, peaks = dict(load_denoiser("toy/sdxl").net.config), []
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            net = UNet2DConditionModel.from_config(config)
            with dry_run.Memory() as memory:
                net(torch.zeros(2, 4, 16, 16), torch.tensor([5, 5]), **c).sample.sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01) and peaks[0] > 10**7  # attention keeps other statistics on real tensors


def test_table_of_states_is_what_two_ranks_hold(two_ranks):
    """Weights, gradients and moments of the toy's networks on each of 2 gloo ranks, and dry_run's arithmetic: within 2 %."""
    two_ranks(WEIGH)


WEIGH = """
import torch, torch.distributed as dist
import cast, config, dry_run, train
from diffusion import sample_generators
from distributed import start_process

rank, ranks, device = start_process()
toy = cast.assemble(config.parse(["--batch-size", "4"]), ranks, device)
size = lambda tensors: sum(getattr(v, "_local_tensor", v).nbytes for v in tensors)
gradients, update = {}, toy.update

def weighed(name, *args):
    gradients[name] = size(p.grad for p in toy.weights(name))
    return update(name, *args)

toy.update = weighed
draw = lambda purpose: sample_generators(0, 1, [2 * rank, 2 * rank + 1], purpose)
prompts = ["a red circle", "a blue ring"]
train.distil(toy, 1, torch.zeros(2, 3, 64, 64), prompts, toy.encoder.encode(prompts), draw, watched=False)
held = {"teacher": size(toy.teacher.net.parameters())}
for row, name in {"generator G": "G", "score estimator": "fake", "D's heads": "D"}.items():
    moments = [v for state in toy.players[name][1].state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    held[row] = size(toy.weights(name)) + gradients[name] + size(moments)
table = {row[0]: dry_run.a_gpu([row], ranks) for row in dry_run.states(toy, frozen=4)}
for name, n in held.items():
    n = torch.tensor(float(n))
    dist.all_reduce(n)
    assert abs(n / ranks / table[name] - 1) < 0.02, (name, n / ranks, table[name])
dist.barrier()  # no rank leaves while another still sums
dist.destroy_process_group()
"""
