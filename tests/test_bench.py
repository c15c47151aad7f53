"""lab.bench: its count of rollout passes beside real iterations, and its table as a command."""

import os
import re
import subprocess
import sys

import pytest
import torch

import dmd
import train
from engine.batch import Batch
from engine.networks import assemble
from lab import bench


@pytest.mark.parametrize("dm_steps", ["high", "all"])
def test_rollouts_are_those_of_iterations(dm_steps):
    """Passes of G over loops with every student step i once: 2 with gradient, counted 3 each, and the rollout."""
    config = train.read(["--batch-size", "1", "--dm-steps", dm_steps])
    nets = assemble(config, 1, torch.device("cpu"), train.prepare)
    c = nets.encoder.encode(["a red circle"])
    steps = {dmd.student_step(nets.S, dm_steps, 0, loop): loop for loop in range(1, 40)}
    assert len(steps) == (4 if dm_steps == "all" else 3)
    for loop in steps.values():
        train.flash(nets, Batch(torch.zeros(1, 3, 64, 64), ["a red circle"], c, [0], loop), 1)
    assert nets.G.passes / len(steps) - 2 * 3 == bench.rollouts(config)


def test_bench_as_a_command(small_toys):
    """The toy with random pictures: the printed sum is that of the rows, the rates follow from the printed times."""
    argv = [sys.executable, "-m", "lab.bench", "--size", "toy", "--batch-size", "1", "--loops", "1", "--repeats", "1"]
    argv += ["--model", small_toys["sdxl"]]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(re.findall(r"^\| (.+?) \| .*?([\d.]+) \|$", done.stdout, re.M))
    total, whole = float(rows.pop("sum")), float(rows.pop("one iteration of train.py"))
    assert float(rows.pop("ratio")) == pytest.approx(whole / total, abs=0.006)
    for part in (
        "rollout",
        "G forward",
        "teacher",
        "fake",
        "VAE",
        "SAM",
        "heads",
        "optimizer step, G",
        "optimizer step, fake",
        "optimizer step, D",
    ):
        assert any(name.startswith(part) for name in rows), part
    assert sum(map(float, rows.values())) == pytest.approx(total, abs=0.05 * len(rows) + 0.1)
    speed, tflop, rate = (
        float(v)
        for v in re.search(
            r"([\d.]+) samples per second; .* GB; ([\d.]+) TFLOP a loop, so ([\d.]+) a", done.stdout
        ).groups()
    )
    assert speed == pytest.approx(1000 / whole, abs=0.006, rel=0.01) and rate == pytest.approx(
        tflop * 1000 / whole, abs=1e-3, rel=0.2
    )
