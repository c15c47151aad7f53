"""LoRA students: two LoRAs on one frozen network, told apart in every pass; resuming, recomputation, diffusers."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import tiny_sd3

import export as export_script
import train
from diffusion import backward_simulation, randn
from engine import real_size, run_folder
from engine.base_model import part_of
from engine.batch import Batch
from engine.errors import UserError
from engine.export import SD_SCRIPTS, export, save_lora
from engine.models import LORA, Denoiser, add_lora, load_denoiser, load_schedule, load_vae
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
@pytest.mark.parametrize("features", [False, True])
def test_gradient_reaches_the_lora_that_was_worn(features, model):
    """Though passes of the other two come between forward and backward; with recomputation, and from features too."""
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
        x_0, seen = G.with_features(x, t, c)
        with torch.no_grad():
            plainly = load_denoiser(model)(x, t, c)
            assert torch.equal(teacher(x, t, c), plainly) and not torch.equal(x_0, plainly)
            assert not any(torch.equal(fake(x, t, c), other) for other in (x_0, plainly))
        (seen if features else x_0).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    plain, again = grads
    assert all("lora_" in name for name in plain) and plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)
        # what becomes of the text tokens in SD3's last block, or after the features, is of no use
        unused = f"transformer_blocks.{2 if features else 5}.attn.add_q_proj" in name
        assert (plain[name].abs().max() > 0) == (".student." in name and not unused), name


@pytest.mark.parametrize("base", ["toy/sdxl", "toy/sd3", "sd35"])
def test_students_lora_trains_resumes_and_loads_back(base, tmp_path, capsys):
    """Its checkpoint is the LoRAs alone; 2 + 1 loops are 3; the code on either export's card draws our picture.

    SDXL's weights are of variant fp16 alone, which the card's code must know.
    """
    loras = [LORA]
    model, rate = base, "1e-3"
    if base == "sd35":  # with T5, qk norm and dual attention; its pictures hardly move at that rate
        model, rate = tiny_sd3(tmp_path / "base", sd35=True), "0.1"
    if base == "toy/sdxl":
        loras.append(SD_SCRIPTS)
        model = shutil.copytree(model, tmp_path / "base")
        for path in list(model.glob("*/*.safetensors")):
            path.rename(path.with_suffix(".fp16.safetensors"))
    flags = ["--model", str(model), "--lr", rate]
    whole, logged, weights = run(tmp_path / "whole", *flags, "--iterations", "3", "--save-every", "2", "--keep", "2")
    assert all(m["g_norm"] > 0 and m["fake_norm"] > 0 for m in logged) and logged[-1]["skipped_updates"] == 0
    run(tmp_path / "half", *flags, "--iterations", "2")
    _, _, again = run(tmp_path / "half", *flags[2:], "--iterations", "3", "--resume")
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
    size = sum(p.stat().st_size for p in (run_folder.newest(whole) / "state").iterdir())
    frozen = load_denoiser(model).net.num_parameters() * 4
    assert size < frozen or base == "sd35"  # with both optimizers; the heads of D are larger than the tiny one

    ours, teachers = (drawn(model, student) for student in (run_folder.newest(whole), None))
    (whole / "metrics.json").write_text('{"prompt_accuracy": 0.875}')
    for lora, files in ((True, loras), (False, [LORA])):
        out = export(whole, tmp_path / f"out-{lora}", lora)
        assert not lora or sorted(os.listdir(out)) == sorted(["README.md", "scheduler", *files])
        for file in files:
            assert not lora or f"- `{file}`: the" in (out / "README.md").read_text()
            theirs = drawn_by_card(out, file)
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


@pytest.mark.parametrize("base", ["sdxl", "sd3"])
def test_cards_of_any_number_of_steps_draw_our_pictures(base, small_toys, tmp_path):
    """A one-step student trains, and its export's code draws our picture; so does that of the student in K steps."""
    model = small_toys[base]
    flags = (
        f"--model {model} --student-steps 1 --iterations 1 --batch-size 2 --gan-weight 0 --preview-every 0 --lr 1e-3"
    )
    made = train.train(train.read([*flags.split(), "--out", str(tmp_path / "run")]))
    settings = json.loads((made / "config.json").read_text())
    seen = []
    for K in (1, 2, 3, 4, 8):
        (made / "config.json").write_text(json.dumps(settings | {"student_steps": K}))
        theirs = drawn_by_card(export(made, tmp_path / f"out-{K}"), LORA)
        assert abs(theirs - drawn(model, run_folder.newest(made), K)).max() <= 2
        assert all(abs(theirs - other).max() > 8 for other in seen)
        seen.append(theirs)


def drawn(model, student, steps=4):
    """The picture of a student, with noise from torch's own generator, as a pipeline without one has it."""
    G, vae = load_denoiser(model, student=student), load_vae(model)
    generators = [torch.default_generator]
    torch.manual_seed(5)
    z = randn(generators, torch.empty(1, vae.channels, 64 // vae.factor, 64 // vae.factor))
    c = load_encoder(model, 64).encode(["a red circle"])
    return pixels(to_pil(vae.decode(backward_simulation(G, z, c, G.schedule.steps(steps), generators))[0]))


def drawn_by_card(out, file):
    """The picture of the code on the card in folder `out`, run as it is but for the names of folder, LoRA, prompt."""
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace(LORA, file)
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
    flow = part_of(model) == "transformer"
    (comfy,) = (line for line in text.splitlines() if line.startswith("- ComfyUI"))
    assert 'sampler "lcm", scheduler "simple", 4 steps, cfg 1' in comfy
    assert ("ModelSamplingSD3 with shift 3." in comfy) == flow == ("shift" in comfy)
    assert ("1000, 900, 750, 500" if flow else "999, 749, 499, 249") in text


def numbered(build, prefix):
    """A network of real geometry on the meta device, and a LoRA for all its LAYERS: keys for diffusers -> numbers."""
    with torch.device("meta"):
        net = build()
        add_lora(net, 4, "student")
    keys = get_peft_model_state_dict(net, adapter_name="student")
    return net, {f"{prefix}.{key}": torch.full((4, 1), float(i)) for i, key in enumerate(keys)}


def original_layers():
    """SDXL's layers under a LoRA, by the names of the original code: residual blocks and transformers of its UNet."""
    depths = {f"input_blocks_{i}": depth for i, depth in ((1, 0), (2, 0), (4, 2), (5, 2), (7, 10), (8, 10))}
    depths |= {f"output_blocks_{i}": (10, 2, 0)[i // 3] for i in range(9)}
    residual = {f"{block}_0": block for block in depths} | {"middle_block_0": "", "middle_block_2": ""}
    names = {f"{block}_{layer}" for block in residual for layer in ("in_layers_2", "out_layers_3")}
    widens = ["input_blocks_4", "input_blocks_7", *(f"output_blocks_{i}" for i in range(9))]
    names |= {f"{block}_0_skip_connection" for block in widens}
    transformers = {f"{block}_1": depth for block, depth in depths.items() if depth} | {"middle_block_1": 10}
    inside = [f"attn{n}_to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    for block, depth in transformers.items():
        names |= {f"{block}_proj_in", f"{block}_proj_out"}
        names |= {f"{block}_transformer_blocks_{d}_{layer}" for d in range(depth) for layer in inside}
    return names


def test_keys_of_sdxls_lora_at_real_size(tmp_path):
    """ComfyUI: "lora_unet_", a diffusers module's path with _ for dots. sd-scripts: the same with the original names.

    Both: lora_down, lora_up and alpha, the rank. diffusers' own reader finds in both what went in.
    """
    net, weights = numbered(lambda: UNet2DConditionModel(**real_size.SDXL), "unet")
    save_lora(weights, net, tmp_path)
    paths = {key.rsplit(".lora_", 1)[0].removeprefix("unet.") for key in weights}
    assert len(paths) == 767 and all(net.get_submodule(path) is not None for path in paths)
    for file, layers in ((LORA, {path.replace(".", "_") for path in paths}), (SD_SCRIPTS, original_layers())):
        kohya = load_file(tmp_path / file)
        ends = ("lora_down.weight", "lora_up.weight", "alpha")
        assert kohya.keys() == {f"lora_unet_{layer}.{end}" for layer in layers for end in ends}
        assert {v.item() for key, v in kohya.items() if key.endswith("alpha")} == {4.0}
        read, alphas = StableDiffusionXLPipeline.lora_state_dict(kohya, unet_config=net.config)
        assert set(alphas.values()) == {4.0}
        read = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in read.items()})
        assert {f"unet.{k}": v.mean().item() for k, v in read.items()} == {
            k: v.mean().item() for k, v in weights.items()
        }


ATTENTION = "to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out".replace(".", "[.]")
FEED_FORWARD = "net[.](0[.]proj|2)"
KNOWN = {  # the layers that ComfyUI's tables have, by base model
    "sd3": rf"transformer_blocks[.]\d+[.](attn[.]({ATTENTION})|attn2[.]to_(q|k|v|out[.]0)"
    rf"|ff(_context)?[.]{FEED_FORWARD}"
    r"|norm1(_context)?[.]linear)|norm_out[.]linear|proj_out",
    "qwen": rf"transformer_blocks[.]\d+[.](attn[.]({ATTENTION})|(img|txt)_mlp[.]{FEED_FORWARD}|(img|txt)_mod[.]1)"
    r"|norm_out[.]linear|proj_out",
    "zimage": r"(layers|(noise|context)_refiner)[.]\d+[.](attention[.]to_(q|k|v|out[.]0)|feed_forward[.]w[123]"
    r"|adaLN_modulation[.]0)|all_final_layer[.]2-1[.](linear|adaLN_modulation[.]1)",
}
LAYERS = {
    "sd3": 335,
    "sd35-medium": 335 + 13 * 4,
    "sd35-large": 38 * 14 - 1,
    "qwen": 60 * 14 + 2,
    "zimage": 34 * 7 + 34,
}


@pytest.mark.parametrize("base", LAYERS)
def test_keys_of_transformers_loras_at_real_size(base, tmp_path):
    """ComfyUI: "transformer.", a diffusers module's path, of the layers that its table has; kohya has no such names."""
    net, weights = numbered(lambda: real_size.denoiser_of(base), "transformer")
    save_lora(weights, net, tmp_path)
    kept = load_file(tmp_path / LORA)
    assert kept.keys() == weights.keys() and os.listdir(tmp_path) == [LORA]
    known = rf"transformer[.]({KNOWN[base if base in KNOWN else 'sd3']})[.]lora_[AB][.]weight"
    assert len(kept) == 2 * LAYERS[base] and all(re.fullmatch(known, key) for key in kept)


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


def test_on_one_gpu_frozen_weights_stay_as_they_are(tmp_path):
    """FSDP2 in a group of one rank, as on one GPU: it takes the LoRAs alone, and their gradients are the plain ones."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]


ALONE = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from engine import distributed
from engine.models import Denoiser, add_lora, load_denoiser
from engine.prompts import load_encoder

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
c, ends = load_encoder("toy/sdxl", 64).encode(["a red circle"]), []
for sharded in (False, True):
    torch.manual_seed(0)
    denoiser = load_denoiser("toy/sdxl")
    net = denoiser.net
    add_lora(net, 4, "student", "fake")
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    if sharded:
        distributed.shard(net, torch.float32)
        assert all(isinstance(p, DTensor) == p.requires_grad for p in net.parameters())
    G = Denoiser(net, denoiser.schedule, torch.float32, {"student": 1.0, "fake": 0.0})
    torch.manual_seed(1)
    G(torch.randn(1, 4, 8, 8), torch.tensor([500]), c).square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all((grad is None) == (".fake." in name) for name, grad in grads.items())
    ends.append([grad.full_tensor() if sharded else grad for grad in grads.values() if grad is not None])
torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-7)
teacher = load_denoiser("toy/sdxl").net.requires_grad_(False)
assert distributed.shard(teacher, torch.float32) is teacher and type(teacher).__name__ == "UNet2DConditionModel"
distributed.leave()
"""
