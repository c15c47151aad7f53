"""The suite runs on the CPU, also where there is a GPU (its exact comparisons are of fp32), and without a network.

For test_gpu.py: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    """Groups first: each runs on one worker, and a long one that begins last is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


class TwoRanks:
    """Two gloo ranks (tests/ranks.py), started when the first program comes, and again after one that failed."""

    def __init__(self, box):
        self.box, self.process, self.jobs = box, None, 0

    def start(self):
        self.box.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--shutdown-timeout", "3"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "TORCHDYNAMO_DISABLE": "1"}
        log = (self.box / "log").open("w")
        program = [*torchrun, "tests/ranks.py", str(self.box)]
        self.process = subprocess.Popen(program, env=env, stdout=log, stderr=log)

    def run(self, text, folder, patience=300):
        """Run a program on both ranks, `folder` its argument; both must end well."""
        if self.process is None:
            self.box = self.box.with_name(f"{self.box.name}+")
            self.jobs = 0
            self.start()
        n, self.jobs = self.jobs, self.jobs + 1
        (self.box / f"{n}.folder").write_text(str(folder))
        (self.box / "next").write_text(text)
        (self.box / "next").rename(self.box / f"{n}.py")
        outcomes = [self.box / f"{n}.{rank}" for rank in (0, 1)]
        deadline = time.time() + patience
        while not all(path.exists() and path.read_text() for path in outcomes):
            failed = [path.read_text() for path in outcomes if path.exists() and path.read_text() not in ("", "ok")]
            if time.time() > deadline or failed or self.process.poll() is not None:
                self.end()
                pytest.fail("\n".join([*failed, (self.box / "log").read_text()[-3000:]]))
            time.sleep(0.02)
        wrong = [path.read_text() for path in outcomes if path.read_text() != "ok"]
        if wrong:
            self.end()
            pytest.fail(wrong[0])

    def end(self):
        """The ranks leave by themselves; torchrun ends those that hang."""
        if self.process and self.process.poll() is None:
            (self.box / "stop").touch()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                self.process.wait()
        self.process = None


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two ranks for the whole session."""
    two = TwoRanks(tmp_path_factory.mktemp("ranks") / "box")
    yield two
    two.end()


@pytest.fixture
def two_ranks(ranks, tmp_path):
    """A function that runs a program, given as text, on 2 gloo ranks; `folder` in it is tmp_path; it must end well."""
    return lambda text: ranks.run(text, tmp_path)


SMALL = {
    "sdxl": {
        "block_out_channels": [16, 32],
        "attention_head_dim": [2, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1],
    },
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 48},
}


@pytest.fixture(scope="session")
def small_toys(tmp_path_factory):
    """The toys with small denoisers of random weights, {"sdxl": folder, "sd3": folder}; a reward model is beside them.

    They are quicker than the trained ones, which amplify rounding, too: in gradients 10,000-fold.
    """
    import torch

    from engine.folders import part_of
    from engine.models import PARTS

    folder = tmp_path_factory.mktemp("toy")
    (folder / "lrm").symlink_to(Path("toy/lrm").resolve())
    for name, changes in SMALL.items():
        part = part_of(f"toy/{name}")
        shutil.copytree(f"toy/{name}", folder / name, ignore=shutil.ignore_patterns(part))
        config = dict(PARTS[part].load_config(f"toy/{name}/{part}")) | changes
        torch.manual_seed(0)
        PARTS[part].from_config(config).save_pretrained(folder / name / part)
    return {name: str(folder / name) for name in SMALL}
