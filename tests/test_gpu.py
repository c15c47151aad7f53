"""What only a GPU can show: the dry run's memory beside that of a real iteration. Needs CUDA and 20 GB of disk.

CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu
"""

import gc

import pytest
import torch

import train
from engine import dry_run
from engine.reward_model import save_reward_model, untrained_reward_model
from lab import random_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LORA = ["--lora-rank", "64"]


@pytest.mark.parametrize(
    "preset, flags",
    [
        ("sdxl-4step", LORA),
        ("sdxl-4step", []),
        ("sd3-4step", []),
        ("sd3-4step", ["--cache-text", "KEPT"]),
        ("sdxl-stage2", [*LORA, "--rl-ratio", "1"]),
    ],
    ids=["SDXL LoRA", "SDXL", "SD3 LoRA with T5", "SD3 LoRA, cached text", "SDXL LoRA stage 2"],
)
def test_dry_run_knows_the_memory(preset, flags, tmp_path):
    """Two loops at 1024 with random weights: the allocator's peak is within 10 % of the dry run's sum.

    SD3: one loop without G, one with it; stage 2: a preference update, then distillation.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    flags = [str(tmp_path / "kept") if flag == "KEPT" else flag for flag in flags]
    flags = ["--batch-size", "1", "--gpus", "1", "--gpu-memory", str(total / 1e9), *flags]
    config = train.read(["--preset", preset, *flags])
    computed = dry_run.report(config, *train.method(config), train.prefer)
    if computed > 0.9 * total:
        pytest.skip(f"needs {computed / 1e9:.0f} GB")
    kind = preset.split("-")[0]
    model, sam = random_models.write(kind, tmp_path)
    random_models.pictures(tmp_path / "pictures", 1024)
    paths = {"--model": model, "--sam": sam, "--clip": "toy/clip", "--data": tmp_path / "pictures"}
    flags += [
        *(str(v) for pair in paths.items() for v in pair),
        "--preview-every",
        "0",
        "--save-every",
        "100",
        "--log-every",
        "100",
    ]
    if preset == "sdxl-stage2":
        before = train.train(
            train.read(["--preset", "sdxl-4step", *flags, "--iterations", "1", "--out", str(tmp_path / "before")])
        )
        save_reward_model(untrained_reward_model(str(model), 1024), tmp_path / "lrm", str(model), half=True)
        flags += ["--init", str(before)]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train.train(train.read(["--preset", preset, *flags, "--iterations", "2", "--out", str(tmp_path / "run")]))
    assert torch.cuda.max_memory_allocated() == pytest.approx(computed, rel=0.1)
