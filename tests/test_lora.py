"""LoRA students: two LoRAs on one frozen network, told apart in every pass; resuming, recomputation, diffusers."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export as export_script
import train
from diffusion import backward_simulation, randn
from engine import run_folder
from engine.batch import Batch
from engine.errors import UserError
from engine.export import export
from engine.models import Denoiser, add_lora, load_denoiser, load_schedule, load_vae
from engine.networks import assemble
from engine.pictures import to_pil
from engine.prompts import load_encoder

SMALL = "--lora-rank 2 --batch-size 2 --preview-every 0 --log-every 1 --lr 1e-3 --fake-lr 1e-3 --lr-schedule constant"


def run(folder, *flags):
    done = train.train(train.read([*SMALL.split(), *flags, "--out", str(folder)]))
    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    return done, logged, load_file(run_folder.newest(done) / "lora" / "pytorch_lora_weights.safetensors")


both = pytest.mark.parametrize("model", ["toy/sdxl", "toy/sd3"])


@both
def test_gradient_reaches_the_lora_that_was_worn(model):
    """Though passes of the other two come between forward and backward; with recomputation too."""
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([300, 700])
    c = load_encoder(model, 64).encode(["a red circle", "a blue ring"])
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
def test_students_lora_trains_resumes_and_loads_back(model, tmp_path, capsys):
    """Its checkpoint is the LoRAs alone; 2 + 1 loops are 3; the code on either export's card draws our picture."""
    whole, logged, weights = run(
        tmp_path / "whole", "--model", model, "--iterations", "3", "--save-every", "2", "--keep", "2"
    )
    assert all(m["g_norm"] > 0 and m["fake_norm"] > 0 for m in logged) and logged[-1]["skipped_updates"] == 0
    run(tmp_path / "half", "--model", model, "--iterations", "2")
    _, _, again = run(tmp_path / "half", "--iterations", "3", "--resume")
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
    size = sum(p.stat().st_size for p in (run_folder.newest(whole) / "state").iterdir())
    frozen = load_denoiser(model).net.num_parameters() * 4
    assert size < frozen  # with both optimizers

    ours, teachers = (drawn(model, student) for student in (run_folder.newest(whole), None))
    (whole / "metrics.json").write_text('{"prompt_accuracy": 0.875}')
    for lora, files in ((True, ["README.md", "pytorch_lora_weights.safetensors", "scheduler"]), (False, None)):
        out = export(whole, tmp_path / f"out-{lora}", lora)
        assert files in (None, sorted(os.listdir(out)))
        theirs = drawn_by_card(out)
        assert abs(theirs - ours).max() <= 2 and abs(theirs - teachers).max() > 8
        check_card((out / "README.md").read_text(), whole, model)

    torn = run_folder.newest(whole) / "lora" / "pytorch_lora_weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    for read in (
        lambda: load_denoiser(model, student=run_folder.newest(whole)),
        lambda: export(whole, tmp_path / "no", lora=True),
    ):
        with pytest.raises(UserError, match="^cannot read lora of .*checkpoint-000003: [^\n]+$"):
            read()
    torn.parent.rename(tmp_path / "lora")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        export_script.main([str(whole), str(tmp_path / "no"), "--lora"])
    assert capsys.readouterr().err.startswith(f"error: {whole} has no LoRA") and not (tmp_path / "no").exists()


def pixels(image):
    return np.array(image).astype(int)


def drawn(model, student):
    """The picture of a student, with noise from torch's own generator, as a pipeline without one has it."""
    G, vae = load_denoiser(model, student=student), load_vae(model)
    generators = [torch.default_generator]
    torch.manual_seed(5)
    z = randn(generators, torch.empty(1, vae.channels, 16, 16))
    c = load_encoder(model, 64).encode(["a red circle"])
    return pixels(to_pil(vae.decode(backward_simulation(G, z, c, G.schedule.steps(4), generators))[0]))


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
    blocks = [text.split(f"## {title}\n\n```json\n")[1].split("```")[0] for title in ("Metrics", "Settings")]
    metrics, settings = map(json.loads, blocks)
    assert metrics == {"prompt_accuracy": 0.875}
    assert settings == json.loads((run / "config.json").read_text()) and settings["lora_rank"] == 2
    (comfy,) = (line for line in text.splitlines() if "ComfyUI" in line)
    assert 'sampler "lcm", scheduler "sgm_uniform", 4 steps, cfg 1' in comfy
    assert ("ModelSamplingSD3 with shift 3." in comfy) == (model == "toy/sd3") == ("shift" in comfy)
    assert ("1000, 900, 750, 500" if model == "toy/sd3" else "999, 749, 499, 249") in text


@both
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_eq_11_on_the_factors(lam, model):
    """After an update of G: ψ = λ ψ + (1 - λ) θ for both factors. The score estimator's own rate is almost 0."""
    flags = f"{SMALL} --model {model} --gan-weight 0 --ema {lam} --fake-lr 1e-30"
    nets = assemble(train.read(flags.split()), 1, torch.device("cpu"), train.prepare)
    prompts = ["a red circle", "a blue ring"]
    before = {k: v.clone() for k, v in nets.fake.net.state_dict().items()}
    train.flash(nets, Batch(torch.zeros(2, 3, 64, 64), prompts, nets.encoder.encode(prompts), [0, 1], loop=1), 1)
    after = nets.G.net.state_dict()
    theta = {k: v for k, v in after.items() if ".student." in k}
    assert any(v.abs().max() > 1e-4 for k, v in theta.items() if "lora_B" in k)  # they start at 0
    for k, v in theta.items():
        psi = k.replace(".student.", ".fake.")
        torch.testing.assert_close(after[psi], lam * before[psi] + (1 - lam) * v, atol=1e-7, rtol=1e-5)


@pytest.mark.xdist_group("ranks")
def test_the_frozen_network_in_bf16(two_ranks):
    """Computing in bf16, fp32 LoRAs take the same steps on a network kept in bf16 as on one kept in fp32."""
    two_ranks(KEPT_IN_BF16)


KEPT_IN_BF16 = """
import torch
from engine import config, distributed
from engine.models import Denoiser, add_lora, load_denoiser
from engine.prompts import load_encoder

rank, ranks, device = distributed.start_process()
for model in ("toy/sdxl", "toy/sd3"):
    c, ends = load_encoder(model, 64, dtype=torch.bfloat16).encode(["a red circle"]), []
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
            loss = student(torch.randn(1, 4, 8, 8), torch.tensor([500]), c).square().mean()
            loss.backward()
            assert distributed.update(optimizer, loss)[1]
        ends.append([p.full_tensor() for p in trained])
    assert all(map(torch.equal, *ends)) and any(ends[0][i].abs().max() > 1e-3 for i in born_zero)
"""
