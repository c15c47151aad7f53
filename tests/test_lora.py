"""LoRA students: two LoRAs on one frozen network, told apart in every pass; resuming, recomputation, and loading back with diffusers."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from engine import checkpoint, config, models, run_folder
from engine.errors import UserError
from engine.models import Denoiser, add_lora, load_denoiser, load_schedule, load_vae
from engine.pictures import generate, to_pil
from engine.prompts import load_encoder

SMALL = "--lora-rank 2 --batch-size 4 --preview-every 0 --log-every 1 --lr 1e-3 --fake-lr 1e-3 --lr-schedule constant".split()


def run(folder, *flags):
    done = train.train(config.parse([*SMALL, *flags, "--out", str(folder)]))
    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    return done, logged, load_file(run_folder.newest(done) / "lora" / "pytorch_lora_weights.safetensors")


both = pytest.mark.parametrize("model", ["toy/sdxl", "toy/sd3"])


@both
def test_gradient_reaches_the_lora_that_was_worn(model):
    """Though the score estimator's and the teacher's passes come between forward and backward; with recomputation too."""
    x, t, c = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([300, 700]),
        load_encoder(model, 64).encode(["a red circle", "a blue ring"]),
    )
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = load_denoiser(model).net
        add_lora(net, 4, "student", "fake")
        ways = ({"student": 0.0, "fake": 0.0}, {"student": 1.0, "fake": 0.0}, {"student": 0.0, "fake": 1.0})
        teacher, G, fake = (Denoiser(net, load_schedule(model), scales=scales) for scales in ways)
        for name, p in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
        if checkpointing:
            net.enable_gradient_checkpointing()
        net.train()
        x_0 = G(x, t, c)
        with torch.no_grad():
            assert not torch.equal(fake(x, t, c), x_0) and torch.equal(teacher(x, t, c), load_denoiser(model)(x, t, c))
        x_0.square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, again = grads
    assert all("lora_" in name for name in plain) and plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
        unused = (
            "transformer_blocks.5.attn.add_q_proj" in name
        )  # SD3's last block makes nothing of its text tokens' queries
        assert (plain[name].abs().max() > 0) == (".student." in name and not unused), name


@both
def test_students_lora_trains_resumes_and_loads_back(model, tmp_path, monkeypatch, capsys):
    """Of the checkpoint, the LoRAs alone; 2 + 1 loops make the weights of 3; the code on either export's card draws our picture."""
    whole, logged, weights = run(
        tmp_path / "whole", "--model", model, "--iterations", "3", "--save-every", "2", "--keep", "2"
    )
    assert all(m["g_norm"] > 0 and m["fake_norm"] > 0 for m in logged) and logged[-1]["skipped_updates"] == 0
    run(tmp_path / "half", "--model", model, "--iterations", "2")
    _, _, again = run(tmp_path / "half", "--iterations", "3", "--resume")
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
    size = sum(p.stat().st_size for p in (run_folder.newest(whole) / "state").iterdir())
    assert (
        size < load_denoiser(model).net.num_parameters() * 4
    )  # with both optimizers, less than the frozen network alone

    monkeypatch.setattr(
        models, "sample_generators", lambda *_: [torch.default_generator]
    )  # what a pipeline without a generator draws from
    encoder, vae, pictures = load_encoder(model, 64), load_vae(model), []
    for student in (run_folder.newest(whole), None):
        G = load_denoiser(model, student=student)
        torch.manual_seed(5)
        pictures.append(pixels(to_pil(generate(G, encoder, vae, ["a red circle"], 4, 0)[0])))
    ours, teachers = pictures
    (whole / "metrics.json").write_text('{"prompt_accuracy": 0.875}')
    for lora, files in ((True, ["README.md", "pytorch_lora_weights.safetensors", "scheduler"]), (False, None)):
        out = checkpoint.export(whole, tmp_path / f"out-{lora}", lora)
        assert files in (None, sorted(os.listdir(out)))
        theirs = drawn_by_card(out)
        assert abs(theirs - ours).max() <= 2 and abs(theirs - teachers).max() > 8
        check_card((out / "README.md").read_text(), whole, model)

    torn = run_folder.newest(whole) / "lora" / "pytorch_lora_weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    for read in (
        lambda: load_denoiser(model, student=run_folder.newest(whole)),
        lambda: checkpoint.export(whole, tmp_path / "no", lora=True),
    ):
        with pytest.raises(UserError, match="^cannot read lora of .*checkpoint-000003: [^\n]+$"):
            read()
    torn.parent.rename(tmp_path / "lora")
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "export", str(whole), str(tmp_path / "no"), "--lora"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        checkpoint.main()
    assert capsys.readouterr().err.startswith(f"error: {whole} has no LoRA") and not (tmp_path / "no").exists()


def pixels(image):
    return np.array(image).astype(int)


def drawn_by_card(out):
    """The picture of the code on the card in folder `out`, run as it is but for the folder's name and the prompt."""
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    load, image, draw = code.replace("THIS_FOLDER", str(out)).replace("a prompt", "a red circle").partition("image = ")
    names = {}
    exec(load, names)
    torch.manual_seed(5)
    exec(image + draw, names)
    return pixels(names["image"])


def check_card(text, run, model):
    metrics, settings = (
        json.loads(text.split(f"## {title}\n\n```json\n")[1].split("```")[0]) for title in ("Metrics", "Settings")
    )
    assert (
        metrics == {"prompt_accuracy": 0.875}
        and settings == json.loads((run / "config.json").read_text())
        and settings["lora_rank"] == 2
    )
    (comfy,) = (line for line in text.splitlines() if "ComfyUI" in line)
    assert 'sampler "lcm", scheduler "sgm_uniform", 4 steps, cfg 1' in comfy
    assert ("ModelSamplingSD3 with shift 3." in comfy) == (model == "toy/sd3") == ("shift" in comfy)
    assert ("1000, 900, 750, 500" if model == "toy/sd3" else "999, 749, 499, 249") in text


@both
@pytest.mark.parametrize("lam, equal", [("0", True), ("1", False)])
def test_eq_11_on_the_factors(lam, equal, model, tmp_path):
    """At λ = 0 the score estimator takes G's LoRA after each of its updates; its own learning rate is as good as zero here."""
    done, *_ = run(tmp_path / "run", "--model", model, "--iterations", "2", "--ema", lam, "--fake-lr", "1e-30")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run_folder.newest(done) / "state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["G"]["model"]
    student = {k: v for k, v in state.items() if ".lora_B.student." in k}
    assert (
        student
        and all(torch.allclose(v, state[k.replace(".student.", ".fake.")], atol=1e-8) for k, v in student.items())
        == equal
    )


def test_the_frozen_network_in_bf16(two_ranks):
    """Computing in bf16, LoRAs on a network kept in bf16 take the same steps, to the bit, as on one kept in fp32; they stay fp32 themselves."""
    two_ranks(KEPT_IN_BF16)


KEPT_IN_BF16 = """
import torch
from engine import config
from engine import distributed
from engine.models import Denoiser, add_lora, load_denoiser
from engine.prompts import load_encoder

rank, ranks, device = distributed.start_process()
for model in ("toy/sdxl", "toy/sd3"):
    c, ends = load_encoder(model, 64, dtype=torch.bfloat16).encode(["a red circle", "a blue ring"]), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        denoiser = load_denoiser(model)
        net = denoiser.net
        add_lora(net, 4, "student", "fake", dtype=dtype)
        assert {p.dtype for p in net.parameters() if not p.requires_grad} == {dtype}
        distributed.shard(net, torch.bfloat16)
        student = Denoiser(net, denoiser.schedule, torch.bfloat16, {"student": 1.0, "fake": 0.0})
        names, trained = zip(*((name, p) for name, p in net.named_parameters() if ".student." in name))
        born_zero = [i for i, name in enumerate(names) if "lora_B" in name]
        assert {p.dtype for p in trained} == {torch.float32}
        optimizer = distributed.adamw(list(trained), 1e-3, config.Config())
        torch.manual_seed(rank)
        for _ in range(2):
            loss = student(torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), c).square().mean()
            loss.backward()
            assert distributed.update(optimizer, loss)[1]
        ends.append([p.full_tensor() for p in trained])
    assert all(map(torch.equal, *ends)) and any(ends[0][i].abs().max() > 1e-3 for i in born_zero)
distributed.leave()
"""
