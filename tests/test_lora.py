"""LoRA students: two LoRAs on one frozen network, told apart in every pass; resuming, recomputation, and loading back with diffusers."""

import json

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

import checkpoint
import config
import run_folder
import train
from diffusion import sample_generators
from models import Denoiser, PromptEncoder, add_lora, generate, load_denoiser, load_schedule, load_vae

SMALL = "--lora-rank 4 --batch-size 4 --preview-every 0 --log-every 1 --lr 1e-3 --fake-lr 1e-3 --lr-schedule constant".split()


def run(folder, *flags):
    done = train.train(config.parse([*SMALL, *flags, "--out", str(folder)]))
    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    return done, logged, load_file(run_folder.newest(done) / "lora" / "pytorch_lora_weights.safetensors")


def test_gradient_reaches_the_lora_that_was_worn():
    """Though the score estimator's and the teacher's passes come between forward and backward; with recomputation too."""
    x, t, c = torch.randn(2, 4, 16, 16), torch.tensor([300, 700]), PromptEncoder("toy/sdxl", 64).encode(["a red circle", "a blue ring"])
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = load_denoiser("toy/sdxl").net
        add_lora(net, 4, "student", "fake")
        ways = ({"student": 0.0, "fake": 0.0}, {"student": 1.0, "fake": 0.0}, {"student": 0.0, "fake": 1.0})
        teacher, G, fake = (Denoiser(net, load_schedule("toy/sdxl"), scales=scales) for scales in ways)
        for name, p in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
        if checkpointing:
            net.enable_gradient_checkpointing()
        net.train()
        x_0 = G(x, t, c)
        with torch.no_grad():
            assert not torch.equal(fake(x, t, c), x_0) and torch.equal(teacher(x, t, c), load_denoiser("toy/sdxl")(x, t, c))
        x_0.square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, again = grads
    assert all("lora_" in name for name in plain) and plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
        assert (plain[name].abs().max() > 0) == (".student." in name), name


def test_students_lora_trains_resumes_and_loads_back(tmp_path):
    """Of the checkpoint, the LoRAs alone; 2 + 1 loops make the weights of 3; a plain pipeline's load_lora_weights draws our picture."""
    whole, logged, weights = run(tmp_path / "whole", "--iterations", "3", "--save-every", "2", "--keep", "2")
    assert all(m["g_norm"] > 0 and m["fake_norm"] > 0 for m in logged) and logged[-1]["skipped_updates"] == 0
    run(tmp_path / "half", "--iterations", "2")
    _, _, again = run(tmp_path / "half", "--iterations", "3", "--resume")
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
    size = sum(p.stat().st_size for p in (run_folder.newest(whole) / "state").iterdir())
    assert size < load_denoiser("toy/sdxl").net.num_parameters() * 4  # with both optimizers, less than the frozen network alone

    encoder, vae, G = PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl"), load_denoiser("toy/sdxl", student=run_folder.newest(whole))
    teacher = load_denoiser("toy/sdxl").net.state_dict()
    assert any(not torch.equal(p, teacher[name]) for name, p in G.net.state_dict().items())
    ours = generate(G, encoder, vae, ["a red circle"], 4, 0)
    pipeline = StableDiffusionXLPipeline.from_pretrained("toy/sdxl", torch_dtype=torch.float32)
    pipeline.load_lora_weights(run_folder.newest(whole) / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"num_inference_steps": 4, "guidance_scale": 0, "height": 64, "width": 64, "output_type": "pt"}
    theirs = pipeline(["a red circle"], generator=sample_generators(0, 0, range(1), "sample"), **sizes).images
    assert ((ours + 1) / 2 - theirs).abs().max() < 2 / 255
    merged = StableDiffusionXLPipeline.from_pretrained(checkpoint.export(whole, tmp_path / "merged"), torch_dtype=torch.float32)
    merged.set_progress_bar_config(disable=True)
    theirs = merged(["a red circle"], generator=sample_generators(0, 0, range(1), "sample"), **sizes).images
    assert ((ours + 1) / 2 - theirs).abs().max() < 2 / 255


@pytest.mark.parametrize("lam, equal", [("0", True), ("1", False)])
def test_eq_11_on_the_factors(lam, equal, tmp_path):
    """At λ = 0 the score estimator takes G's LoRA after each of its updates; its own learning rate is as good as zero here."""
    done, *_ = run(tmp_path / "run", "--iterations", "2", "--ema", lam, "--fake-lr", "1e-30")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run_folder.newest(done) / "state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["G"]["model"]
    student = {k: v for k, v in state.items() if ".lora_B.student." in k}
    assert student and all(torch.allclose(v, state[k.replace(".student.", ".fake.")], atol=1e-8) for k, v in student.items()) == equal
