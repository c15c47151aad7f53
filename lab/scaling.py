"""Weak scaling on this machine: 8 samples a rank on 1 rank and on 2, a core each.

    python -m lab.scaling

It prints seconds a loop, and the bytes that collectives move. FSDP2 must gather a network's weights for every forward
pass and again for every backward pass, and scatter the sums of its gradients once per backward pass: these bytes stand
beside those counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from statistics import median

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from engine import data
from engine.batch import Batch
from engine.distributed import start_process
from engine.flags import at_least
from engine.networks import assemble


class Traffic(TorchDispatchMode):
    """Counts what collectives move: per kind, the bytes of the whole tensor that is gathered, scattered or summed."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.name()
        if kind.startswith("c10d::"):
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.bytes[kind.removeprefix("c10d::")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def worker(loops):
    """What each rank runs: `loops` loops of stage 1.

    Rank 0 prints seconds, bytes moved, and bytes that FSDP2 must move, each a loop.
    """
    rank, ranks, device = start_process()
    nets = assemble(train.read(["--batch-size", str(8 * ranks)]), ranks, device, train.prepare)
    passes = Counter()
    for net in (nets.G.net, nets.fake.net, nets.teacher.net):
        size = sum(p.numel() for p in net.parameters()) * 4
        trained = any(p.requires_grad for p in net.parameters())

        def count(module, inputs, output, size=size, trained=trained):
            passes["forward"] += size
            if trained and torch.is_grad_enabled():
                passes["backward"] += size

        net.register_forward_hook(count)
    source = data.source("toy", 64)
    seconds = []
    traffic = Traffic()
    for loop in range(1, 2 * loops + 2):  # a warm-up, then for time, then for bytes: counting costs time
        index = range((loop * ranks + rank) * 8, (loop * ranks + rank + 1) * 8)
        images = torch.stack([source[i][0] for i in index])
        prompts = [source[i][1] for i in index]
        batch = Batch(images.to(device), prompts, nets.encoder.encode(prompts), list(index), loop)
        began = time.perf_counter()
        with traffic if loop > loops + 1 else nullcontext():
            train.flash(nets, batch, loop)
        seconds.append(time.perf_counter() - began)
        if loop == loops + 1:
            passes.clear()
    if rank == 0:
        must = 2 * passes["backward"] + passes["forward"] if ranks > 1 else 0
        moved = {k: v / loops for k, v in traffic.bytes.items()}
        measured = {"ranks": ranks, "seconds": median(seconds[1 : loops + 1]), "moved": moved, "must": must / loops}
        print(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loops", type=at_least(1), default=30)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.loops)
    found = []
    for ranks in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        argv = [sys.executable, *torchrun, "-m", "lab.scaling", "--worker", "--loops", str(args.loops)]
        done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print("| ranks x samples | seconds a loop | efficiency | MB moved a loop | MB that FSDP2 must move |")
    print("| --- | --- | --- | --- | --- |")
    for row in found:
        share = found[0]["seconds"] / row["seconds"]
        moved, must = sum(row["moved"].values()) / 1e6, row["must"] / 1e6
        print(f"| {row['ranks']} x 8 | {row['seconds']:.3f} | {share:.2f} | {moved:.1f} | {must:.1f} |")
    print("by collective: " + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in found[-1]["moved"].items()))


if __name__ == "__main__":
    main()
