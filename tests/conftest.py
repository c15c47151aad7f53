"""The suite runs on the CPU, also where there is a GPU (its exact comparisons are of fp32), and without a network.

For test_gpu.py: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import os
import subprocess
import sys

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def two_ranks(tmp_path):
    """A function that runs a program, given as text, on 2 gloo ranks, tmp_path its argument; it must end well."""

    def run(text, **env):
        script = tmp_path / "program.py"
        script.write_text(text)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = [*torchrun, str(script), str(tmp_path)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."} | env
        done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-3000:]

    return run
