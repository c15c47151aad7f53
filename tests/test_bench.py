"""lab.bench: its count of rollout passes beside real iterations, and its table as a command."""

import os
import re
import subprocess
import sys

import pytest
import torch

import train
from diffusion import sample_generators
from engine.config import parse
from engine.networks import assemble
from lab import bench


@pytest.mark.parametrize("dm_steps", ["high", "all"])
def test_rollouts_are_those_of_iterations(dm_steps):
    """The toy's distil, whose passes of G count 1 each, 3 with gradient: over loops with every i once, 2 passes with gradient and the rollout."""
    cast = assemble(parse(["--batch-size", "1", "--dm-steps", dm_steps]), 1, torch.device("cpu"))
    draw = lambda purpose: sample_generators(0, 1, [0], purpose)  # noqa: E731
    loops = {"all": (11, 4, 1, 2), "high": (11, 4, 1)}[dm_steps]  # where seed 0 draws i = 0, 1, 2 and 3; 0, 1, 2
    for loop in loops:
        train.distil(cast, loop, torch.zeros(1, 3, 64, 64), ["a red circle"], cast.encoder.encode(["a red circle"]), draw, watched=False)
    assert cast.G.passes / len(loops) - 2 * 3 == bench.rollouts(cast.config)


def test_bench_as_a_command():
    """The toy with random pictures: the printed sum is that of the rows, and the rates follow from the printed times."""
    argv = [sys.executable, "-m", "lab.bench", "--size", "toy", "--batch-size", "1", "--loops", "12", "--repeats", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(re.findall(r"^\| (.+?) \| .*?([\d.]+) \|$", done.stdout, re.M))
    total, whole = float(rows.pop("sum")), float(rows.pop("one iteration of train.py"))
    assert float(rows.pop("ratio")) == pytest.approx(whole / total, abs=0.006)
    for part in ("rollout", "G forward", "teacher", "fake", "VAE", "SAM", "heads", "optimizer step, G", "optimizer step, fake", "optimizer step, D"):
        assert any(name.startswith(part) for name in rows), part
    assert sum(map(float, rows.values())) == pytest.approx(total, abs=0.05 * len(rows) + 0.1)
    speed, tflop, rate = (
        float(v) for v in re.search(r"([\d.]+) samples per second; .* GB; ([\d.]+) TFLOP a loop, so ([\d.]+) a", done.stdout).groups()
    )
    assert speed == pytest.approx(1000 / whole, abs=0.006, rel=0.01) and rate == pytest.approx(tflop * 1000 / whole, abs=1e-3, rel=0.2)
