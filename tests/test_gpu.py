"""What only a GPU can show: the dry run's memory beside the memory of a real iteration. Needs CUDA and 20 GB of disk; skipped elsewhere.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import json

import pytest
import torch

import dry_run
import train
from config import parse
from data import to_pil
from lab import random_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("flags", [["--lora-rank", "64"], []])
def test_dry_run_knows_the_memory_of_sdxl(flags, tmp_path):
    """Two loops of SDXL at 1024 with random weights: the allocator's peak within 10 % of the dry run's sum."""
    total = torch.cuda.get_device_properties(0).total_memory
    argv = ["--preset", "sdxl-4step", "--batch-size", "1", "--iterations", "2", "--gpus", "1", "--gpu-memory", str(total / 1e9), *flags]
    computed = dry_run.report(parse([*argv, "--dry-run"]), train.distil, train.prefer)
    if computed > 0.9 * total:
        pytest.skip(f"needs {computed / 1e9:.0f} GB")
    model, sam = random_models.write("sdxl", tmp_path)
    for i in range(4):
        to_pil(torch.rand(3, 1024, 1024) * 2 - 1).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "text": "a picture"}) + "\n" for i in range(4)))
    paths = {"--model": model, "--sam": sam, "--clip": "toy/clip", "--data": tmp_path, "--out": tmp_path / "run"}
    torch.cuda.reset_peak_memory_stats()
    train.train(
        parse([*argv, *(str(v) for pair in paths.items() for v in pair), "--preview-every", "0", "--save-every", "100", "--log-every", "100"])
    )
    assert torch.cuda.max_memory_allocated() == pytest.approx(computed, rel=0.1)
