"""What only a GPU can show: every method on CUDA, and the dry run's memory beside that of real iterations.

CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu -n 4     CUDA; 60 GB of disk, 170 more for "SDXL"
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import evaluate
import export
import sample
import train
from engine import dry_run, run_folder
from engine.reward_model import save_reward_model, untrained_reward_model
from lab import random_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LORA = ["--lora-rank", "64"]
METHODS = {
    "SDXL": [],
    "SDXL, micro-batches": ["--micro-batch", "2", "--checkpointing", "--gan-crop", "32"],
    "SDXL LoRA": ["--lora-rank", "8"],
    "SDXL LoRA on 8 bits": ["--lora-rank", "8", "--quantize-frozen", "int8"],
    "SDXL, 8-bit AdamW": ["--optimizer", "adamw8bit"],
    "SDXL, caches": [*"--data {0}/kept --cache-text {0}/text --cache-latents {0}/latents --gan-reals vae".split()],
    "SDXL, another teacher": ["--teacher", "toy/sdxl", "--lora-rank", "8"],
    "SD3": ["--model", "toy/sd3"],
    "SDXL, stage 2": ["--stage", "2"],
    "SD3, stage 2": ["--stage", "2", "--model", "toy/sd3"],
    "DMD2": ["--preset", "dmd2", "--ttur", "1"],
    "DMDR": ["--preset", "dmdr", "--ttur", "1", "--dynamic", "1"],
    "DMDR, GRPO": ["--preset", "dmdr", "--ttur", "1", "--dynamic", "1", "--rl", "grpo", "--candidates", "4"],
    "AdvDMD": ["--preset", "advdmd", "--ttur", "1", "--rl-after", "1", "--candidates", "4"],
}


def metrics_of(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_every_method_runs_on_cuda(flags, tmp_path):
    """Two loops with a checkpoint written in the background, resumed for a third; then a picture of the student."""
    if "int8" in flags or "adamw8bit" in flags:
        pytest.importorskip("torchao")
    random_models.pictures(tmp_path / "kept", 64)
    flags = ["--batch-size", "8", *(flag.format(tmp_path) for flag in flags)]
    flags += ["--log-every", "1", "--preview-every", "2", "--save-every", "1"]
    if "2" == dict(zip(flags, flags[1:])).get("--stage"):
        before = [*flags, "--stage", "1", "--iterations", "1", "--out", str(tmp_path / "before")]
        flags += ["--init", str(train.train(train.read(before))), "--rl-ratio", "1"]
    out = str(tmp_path / "run")
    train.train(train.read([*flags, "--iterations", "2", "--out", out]))
    train.train(train.read(["--resume", "--iterations", "3", "--out", out]))
    assert json.loads((run_folder.newest(out) / "progress.json").read_text())["loops"] == 3
    assert not any(m.get("skipped_updates") for m in metrics_of(out))
    sample.main(["--run", out, "--num", "1", "--prompt", "a red circle", "--out", str(tmp_path / "pictures")])
    assert list((tmp_path / "pictures").glob("*.png"))


@pytest.mark.parametrize("model", ["toy/sdxl", "toy/sd3"])
def test_cuda_takes_the_cpu_s_steps(model, tmp_path):
    """The first loop's losses are the CPU's, but for bf16; so are the student's pictures, in fp32."""
    out = {device: tmp_path / device for device in ("cpu", "cuda")}
    flags = ["--model", model, "--batch-size", "8", "--iterations", "1", "--log-every", "1", "--preview-every", "0"]
    cpu = [sys.executable, "train.py", *flags, "--out", str(out["cpu"])]
    subprocess.run(cpu, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    train.train(train.read([*flags, "--out", str(out["cuda"])]))
    a, b = (metrics_of(run)[0] for run in out.values())
    for loss in ("dm_loss", "adv_loss", "fake_loss", "d_loss"):
        assert b[loss] == pytest.approx(a[loss], rel=0.05), loss
    pictures = []
    for device in out:
        folder = tmp_path / f"pictures-{device}"
        of_run = ["--run", str(out["cpu"]), "--num", "2", "--prompt", "a red circle", "--dtype", "fp32"]
        sample.main([*of_run, "--device", device, "--out", str(folder)])
        pictures.append([np.asarray(Image.open(path), dtype=int) for path in sorted(folder.glob("0*.png"))])
    assert np.abs(np.subtract(*pictures)).max() <= 2


def test_a_student_is_measured_and_exported(tmp_path):
    out = str(tmp_path / "run")
    train.train(train.read(["--batch-size", "8", "--iterations", "1", "--preview-every", "0", "--out", out]))
    evaluate.main(["--run", out, "--num", "16", "--json", str(tmp_path / "metrics.json")])
    assert json.loads((tmp_path / "metrics.json").read_text())["frechet"] > 0
    export.main([out, str(tmp_path / "pipeline")])
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_compiled_steps_are_the_same(tmp_path):
    """--compile: three loops' losses are those of the plain networks. Compiling takes minutes."""
    flags = (
        "--batch-size 2 --iterations 3 --log-every 1 --preview-every 0 --gan-weight 0 --lr-schedule constant".split()
    )
    plain, compiled = (
        train.train(train.read([*flags, *more, "--out", str(tmp_path / f"{bool(more)}")]))
        for more in ([], ["--compile"])
    )
    for a, b in zip(metrics_of(plain), metrics_of(compiled), strict=True):
        assert b["dm_loss"] == pytest.approx(a["dm_loss"], rel=1e-3)
        assert b["fake_loss"] == pytest.approx(a["fake_loss"], rel=1e-3)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A function: kind ("sdxl", "sd3") -> its folder and SAM's checkpoint, written once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "random"

    def get(kind):
        with FileLock(f"{folder}.lock"):
            if not (folder / kind).exists():
                random_models.write(kind, folder)
                torch.cuda.empty_cache()
        return folder / kind, folder / "sam_vit_b_random.pth"

    return get


REAL = {
    "SDXL LoRA": ("sdxl-4step", LORA),
    "SDXL LoRA stage 2": ("sdxl-stage2", [*LORA, "--rl-ratio", "1"]),
    "SD3 LoRA with T5": ("sd3-4step", []),
    "SD3 LoRA, cached text": ("sd3-4step", ["--cache-text", "{}/text"]),
    "SDXL": ("sdxl-4step", []),
}


@pytest.mark.parametrize("name", REAL)
def test_dry_run_knows_the_memory(name, random_model, tmp_path):
    """Two loops of train.py at 1024 with random weights: the peak it logs is within 10 % of the dry run's sum.

    The first loop's checkpoint is written while the second runs. SD3: one loop without G, one with it; stage 2: a
    preference update, then distillation.
    """
    preset, flags = REAL[name]
    total = torch.cuda.get_device_properties(0).total_memory
    flags = [flag.format(tmp_path) for flag in flags]
    config = train.read(["--preset", preset, *flags, "--batch-size", "1", "--gpus", "1"])
    computed = dry_run.report(config, *train.method(config), train.prefer)
    if computed > 0.9 * total:
        pytest.skip(f"needs {computed / 1e9:.0f} GB")
    if not config.lora_rank and shutil.disk_usage(tmp_path).free < 170e9:
        pytest.skip("two checkpoints of 72 GB need a larger disk")
    model, sam = random_model(preset.split("-")[0])
    random_models.pictures(tmp_path / "pictures", 1024)
    paths = ["--model", model, "--sam", sam, "--clip", "toy/clip", "--data", tmp_path / "pictures"]
    common = [*map(str, paths), "--batch-size", "1", "--preview-every", "0", "--save-every", "1", "--log-every", "2"]
    if preset == "sdxl-stage2":
        before = ["--preset", "sdxl-4step", *LORA, *common]
        command([*before, "--iterations", "1", "--out", str(tmp_path / "before")])
        save_reward_model(untrained_reward_model(str(model), 1024), tmp_path / "lrm", str(model), half=True)
        flags += ["--init", str(tmp_path / "before"), "--reward", str(tmp_path / "lrm")]
    with FileLock(model.parent / "gpu.lock"):  # one at a time has the GPU
        command(["--preset", preset, *flags, *common, "--iterations", "2", "--out", str(tmp_path / "run")])
    peak = max(m["memory_gb"] for m in metrics_of(tmp_path / "run"))
    print(f"{name}: {peak:.2f} GB, the dry run's {computed / 1e9:.2f}")
    shutil.rmtree(tmp_path)
    assert peak == pytest.approx(computed / 1e9, rel=0.1)


def command(argv):
    """train.py in a process of its own; it must end well."""
    done = subprocess.run([sys.executable, "train.py", *argv], capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
