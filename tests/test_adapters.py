"""What every base model must show, on pipelines of random weights (tests/tiny_models.py, and the toys made small).

A new one joins BASES and the fixture base_models. docs/models.md has the contract.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from test_lora import drawn_by_card, pixels
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train
from diffusion import add_noise, guided, sample_generators, times
from engine import run_folder
from engine.errors import UserError
from engine.export import export, student_scheduler
from engine.models import VAE, add_lora, load_denoiser, load_schedule, load_vae
from engine.networks import assemble
from engine.one_frame import OneFrame
from engine.pictures import generate, to_pil
from engine.prompts import load_encoder
from engine.quantize import in_8_bits

PROMPTS = ["it", "a large blue ring above a small red square"]
BASES = ["sdxl", "sd3", "qwen", "z-image"]
NEW = ["qwen", "z-image"]  # the others' training and export have tests of their own
WORDS = dict.fromkeys(("sd3", "sd35"), {"max_sequence_length": 256})  # of the pipeline's call
GUIDED = {  # w -> the pipeline's arguments
    "sdxl": lambda w: {"guidance_scale": w},
    "sd3": lambda w: {"guidance_scale": w},
    "sd35": lambda w: {"guidance_scale": w},
    "qwen": lambda w: {"true_cfg_scale": w, "negative_prompt": [" "] * len(PROMPTS)},
    "z-image": lambda w: {"guidance_scale": w - 1},
}


class Plain:
    """Diffusers' own pipeline of a base model."""

    def __init__(self, base, folder):
        self.base = base
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def as_given(self, z):
        """Latents (B, C, h, w) as the pipeline has them."""
        return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2) if self.base == "qwen" else z

    def as_ours(self, z):
        """And back, of 64 pixels."""
        return F.pixel_shuffle(z.transpose(1, 2).unflatten(2, (4, 4)), 2) if self.base == "qwen" else z

    def draw(self, z, steps, seed=0, **how):
        """PROMPTS' pictures in [-1, 1] from noise z; later noise is torch's own."""
        if self.base in ("sd3", "sd35"):  # its pipeline's own grid is another
            how["sigmas"] = [n / steps for n in range(steps, 0, -1)]
        torch.manual_seed(seed)
        how |= WORDS.get(self.base, {}) | {"num_inference_steps": steps, "latents": self.as_given(z)}
        return self.pipeline(list(PROMPTS), height=64, width=64, output_type="pt", **how).images * 2 - 1


@pytest.fixture(scope="module")
def bases(base_models):
    """A function: base model -> its prompt encoder, VAE, denoiser and noise for PROMPTS. They are loaded once."""
    made = {}

    def of(base):
        if base not in made:
            model = base_models[base]
            encoder, vae, net = load_encoder(model, 64), load_vae(model), load_denoiser(model, resolution=64)
            side = 64 // vae.factor
            draws = sample_generators(0, 0, range(2), "sample")
            z = torch.stack([torch.randn(vae.channels, side, side, generator=g) for g in draws])
            made[base] = SimpleNamespace(model=model, encoder=encoder, vae=vae, net=net, z=z)
        return made[base]

    return of


@pytest.mark.parametrize("base", [*BASES, "sd35"])
def test_sampling_is_the_plain_pipelines(base, bases):
    """Pictures within 1/255: 6 steps without and with guidance, and 1, 2 and 4 steps by an exported scheduler.

    Prompts of unequal length: each draws alone what it draws among others. Another prompt draws another picture.
    """
    b = bases(base)
    plain = Plain(base, b.model)
    far = []
    for w in (1.0, 4.0):
        teacher = guided(b.net, b.encoder.null(), w)
        ours = generate(teacher, b.encoder, b.vae, PROMPTS, 6, 0, ode=True)
        far.append(apart(ours, plain.draw(b.z, 6, **GUIDED[base](w))))
        for i, prompt in enumerate(PROMPTS):
            alone = generate(teacher, b.encoder, b.vae, [prompt], 6, 0, first=i, ode=True)
            assert apart(alone[0], ours[i]) < 1 / 255
        other = generate(teacher, b.encoder, b.vae, PROMPTS[::-1], 6, 0, ode=True)
        assert apart(ours, other) > 10 / 255
    c = b.encoder.encode(PROMPTS)
    for K in (1, 2, 4):
        plain.pipeline.scheduler = student_scheduler(b.model, K, 64)
        theirs = plain.draw(b.z, K, seed=5, **UNGUIDED[base])
        torch.manual_seed(5)
        far.append(apart(b.vae.decode(few_steps(b.net, b.z, c, K, plain)).clamp(-1, 1), theirs))
        assert plain.pipeline.scheduler.timesteps.tolist() == pytest.approx(b.net.schedule.steps(K).tolist(), abs=1e-3)
    assert max(far) <= 1 / 255


UNGUIDED = {"qwen": {"true_cfg_scale": 1.0}} | {base: {"guidance_scale": 0} for base in GUIDED if base != "qwen"}


def apart(a, b):
    """The largest difference of pixels in [-1, 1], as a part of their range."""
    return ((a - b).abs().max() / 2).item()


@torch.no_grad()
def few_steps(G, z, c, K, plain):
    """Eq. 8 with noise from torch's own generator, in the layout of the pipeline's latents."""
    S = G.schedule.steps(K)
    for i, t in enumerate(S):
        x_0 = G(z, times(t, z), c)
        if i + 1 < K:
            noise = plain.as_ours(torch.randn(plain.as_given(x_0).shape))
            z = add_noise(G.schedule, x_0, times(S[i + 1], z), noise)
    return x_0


@pytest.mark.parametrize("base", BASES)
def test_features_lie_where_the_picture_is(base, bases):
    """A changed latent changes the features of its own place most; x_0 is that of the plain call. Pictures 2 : 3."""
    b = bases(base)
    torch.manual_seed(0)
    x_t = torch.randn(1, b.vae.channels, 8, 12)
    c, t = b.encoder.encode(PROMPTS[:1]), torch.tensor([500.0 if b.net.schedule.prediction == "flow" else 500])
    with torch.no_grad():
        x_0, features = b.net.with_features(x_t, t, c)
        torch.testing.assert_close(x_0, b.net(x_t, t, c))
        for y, x in ((0, 0), (5, 3), (6, 11)):
            changed = x_t.clone()
            changed[..., y, x] += 3
            far = (b.net.with_features(changed, t, c)[1] - features).norm(dim=1)[0]
            row, column = divmod(int(far.argmax()), far.shape[1])
            beside = 1 if base == "sdxl" else 0  # convolutions spread it
            assert abs(row - y * far.shape[0] // 8) <= beside and abs(column - x * far.shape[1] // 12) <= beside


@pytest.mark.parametrize("base", BASES)
def test_every_layer_under_a_lora_is_trained(base, bases):
    """LoRAs reach all linear layers in the blocks; each gets a gradient but what nothing comes after."""
    net = load_denoiser(bases(base).model, resolution=64)
    linear = {name for name, module in net.net.named_modules() if isinstance(module, torch.nn.Linear)}
    add_lora(net.net, 2, "student")
    adapted = {name.removesuffix(".base_layer") for name, _ in net.net.named_modules() if name.endswith(".base_layer")}
    inside = {name for name in linear if "blocks." in name or name.startswith("layers.") or "refiner." in name}
    assert linear and {name for name in inside - adapted if "time_emb" not in name} == set()
    net.net.train()
    net(bases(base).z, torch.tensor([500, 700]), bases(base).encoder.encode(PROMPTS)).square().mean().backward()
    lacking = {name for name, p in net.net.named_parameters() if "lora_B" in name and p.grad is None}
    assert all("to_add_out" in name or "txt_mlp" in name for name in lacking) and bool(lacking) == (base == "qwen")


def test_qwens_vae_in_one_frame(bases):
    """Its own encoder and decoder, but for the clamp: out of range there is a gradient, also with recomputation."""
    vae = bases("qwen").vae
    own = AutoencoderKLQwenImage.from_pretrained(bases("qwen").model, subfolder="vae")
    torch.manual_seed(0)
    images, z = torch.rand(2, 3, 64, 96) * 2 - 1, 3 * torch.randn(2, 16, 8, 12)
    mean, std = (torch.tensor(own.config[f"latents_{name}"]).view(1, 16, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = own.decode((z * std + mean)[:, :, None]).sample[:, :, 0]
        encoded = own.encode(images[:, :, None]).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(vae.encode(images), (encoded - mean) / std, atol=1e-5, rtol=1e-4)
    ours = vae.decode(z)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, atol=1e-5, rtol=1e-4)
    outside = ours.abs() > 1
    assert 0 < outside.float().mean() < 1
    grads = []
    for recompute in (False, True):
        again = VAE(OneFrame(AutoencoderKLQwenImage.from_pretrained(bases("qwen").model, subfolder="vae")))
        if recompute:
            again.net.enable_gradient_checkpointing()
        y = z.clone().requires_grad_()
        (again.decode(y) * outside).sum().backward()
        grads.append(y.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_qwens_schedule(base_models):
    """The teacher's grid is stretched to end at 0.02; shifts by size, and students' steps, are those of the formula."""
    found = {side: load_schedule(base_models["qwen"], side) for side in (512, 1024, 1328, 1536)}
    assert [round(s.shift, 3) for s in found.values()] == [1.714, 2.001, 2.303, 2.59]
    teacher = found[1024].sampler_steps(4)
    assert teacher[-1].item() == pytest.approx(20, abs=1e-3) and teacher[0] == 1000
    assert found[1024].sampler_steps(1).tolist() == [1000]
    assert found[1024].steps(4).tolist() == pytest.approx([1000, 857.2, 666.9, 400.2], abs=0.2)


# --------------------------------------------------------------------------------------------- training


SMALL = "--batch-size 2 --log-every 1 --lr 1e-3 --fake-lr 1e-3 --lr-schedule constant --lora-rank 2 --ttur 1"


def trained(model, out, *more):
    run = train.train(train.read([*f"--model {model} {SMALL} --out {out}".split(), *more]))
    return run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run, out):
    """Everything in the newest checkpoint, as one flat dict of tensors."""
    dcp_to_torch_save(run_folder.newest(run) / "state", out)
    found = {}

    def walk(value, path=()):
        for key, v in value.items() if isinstance(value, dict) else ():
            walk(v, (*path, key))
        if torch.is_tensor(value):
            found[path] = value

    walk(torch.load(out, weights_only=False))
    return found


@pytest.mark.parametrize("base", NEW)
def test_stage_1_resumes_and_exports(base, base_models, tmp_path):
    """Pixel-GAN through the VAE, a LoRA: two loops and one more are three, to the bit, optimizers included.

    Both exports load in plain diffusers: the code on their cards draws our picture, in 1, 2 and 4 steps.
    """
    model = base_models[base]
    fast = ["--lr", "0.1"]  # so that pictures move
    whole, logged = trained(model, tmp_path / "whole", "--iterations", "3", "--preview-every", "3", *fast)
    assert all(m["g_norm"] > 0 and m["fake_norm"] > 0 and "adv_loss" in m for m in logged if "dm_loss" in m)
    assert logged[-1]["skipped_updates"] == 0 and (whole / "preview-000003.png").is_file()
    half, _ = trained(model, tmp_path / "half", "--iterations", "2", "--preview-every", "0", *fast)
    trained(model, tmp_path / "half", "--iterations", "3", "--preview-every", "0", "--resume", *fast)
    first, second = state(whole, tmp_path / "a.pt"), state(half, tmp_path / "b.pt")
    assert first.keys() == second.keys() and all(torch.equal(v, second[key]) for key, v in first.items())

    settings = json.loads((whole / "config.json").read_text())
    file = "pytorch_lora_weights.safetensors"
    for K in (4, 1, 2):
        (whole / "config.json").write_text(json.dumps(settings | {"student_steps": K}))
        ours, teachers = (card_picture(base, model, student, K) for student in (run_folder.newest(whole), None))
        for lora in (False, True) if K == 4 else (False,):
            out = export(whole, tmp_path / f"out-{K}-{lora}", lora)
            theirs = drawn_by_card(out, file)
            assert abs(theirs - ours).max() <= 2 and abs(theirs - teachers).max() > 8
    kept = load_file(tmp_path / "out-4-True" / file)
    assert all(key.startswith("transformer.") for key in kept)


def card_picture(base, model, student, K):
    """Our picture of the card's prompt, from the noise that its pipeline draws."""
    G, vae = load_denoiser(model, student=student, resolution=64), load_vae(model)
    plain = SimpleNamespace(as_given=lambda z: Plain.as_given(SimpleNamespace(base=base), z))
    plain.as_ours = lambda z: Plain.as_ours(SimpleNamespace(base=base), z)
    torch.manual_seed(5)
    z = torch.randn(1, 16, 8, 8)
    x_0 = few_steps(G, z, load_encoder(model, 64).encode(["a red circle"]), K, plain)
    return pixels(to_pil(vae.decode(x_0)[0]))


METHODS = {
    "dmd2": "--method dmd2",
    "last block": "--method dmd2 --d-block last",
    "advdmd": "--method advdmd --rl-after 0 --rl-gate 0 --candidates 2",
    "dmdr": "--method dmdr --dynamic 1 --reward clip --reward-start 0",
}


@pytest.mark.parametrize("base", NEW)
@pytest.mark.parametrize("method", METHODS)
def test_siblings(method, base, base_models, tmp_path):
    """One loop of each, with recomputation: finite, nothing skipped."""
    flags = f"{METHODS[method]} --iterations 1 --preview-every 0 --checkpointing --ttur 1"
    _, logged = trained(base_models[base], tmp_path / "run", *flags.split())
    assert logged[-1]["skipped_updates"] == 0 and logged[0]["fake_norm"] > 0
    assert {"d_loss", "reward"} & logged[0].keys()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_teacher_beside_the_model(rank, base_models, tmp_path):
    """--teacher: the real score is its own at every noise level, G and the score estimator start as --model.

    As Z-Image beside a distilled Z-Image-Turbo, whose shift differs. A run resumes, and its student is --model's.
    """
    model, teacher = Path(base_models["z-image"]), tmp_path / "teacher"
    shutil.copytree(model, teacher)
    file = "transformer/diffusion_pytorch_model.safetensors"
    started = load_file(model / file)
    louder = {key: 1.2 * v for key, v in started.items()}
    save_file(louder, teacher / file)
    scheduler = teacher / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 3.0}))
    flags = ["--model", str(model), "--teacher", str(teacher), *SMALL.split(), "--lora-rank", str(rank)]
    nets = assemble(train.read(flags), 1, torch.device("cpu"), train.prepare)
    c, x = nets.encoder.encode(PROMPTS), torch.randn(2, 16, 8, 8)
    t = torch.tensor([300.0, 800.0])
    for made, folder in ((nets.teacher, teacher), (nets.G, model), (nets.fake, model)):
        own = load_denoiser(str(folder), resolution=64)
        torch.testing.assert_close(made(x, t, c), own(x, t, c), rtol=1e-4, atol=1e-4)
        assert made.schedule == load_schedule(str(model), 64)
    assert nets.teacher.schedule != load_schedule(str(teacher), 64)
    assert not any(p.requires_grad for p in nets.teacher.net.parameters())
    trained(str(model), tmp_path / "run", *flags[2:], "--iterations", "1", "--preview-every", "0")
    with pytest.raises(UserError, match="--teacher"):
        trained(
            str(model), tmp_path / "run", *SMALL.split(), "--lora-rank", str(rank), "--resume", "--teacher", str(model)
        )
    run, _ = trained(str(model), tmp_path / "run", *flags[2:], "--iterations", "2", "--resume")
    student = load_denoiser(str(model), student=run_folder.newest(run), resolution=64).net.state_dict()
    moved, away = (max((v - of[key]).abs().max() for key, v in student.items()) for of in (started, louder))
    assert 0 < moved < 0.01 and away > 0.1


def test_a_teacher_that_does_not_fit_is_refused(base_models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base_models["sdxl"], other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    wrong = {base_models["z-image"]: "is a ZImagePipeline", str(other): "differ in prediction_type", "none": "none"}
    for teacher, why in wrong.items():
        with pytest.raises(UserError, match=why):
            run_folder.look(train.read(["--model", base_models["sdxl"], "--teacher", teacher]))
    old = json.loads((Path(base_models["sdxl"]) / "scheduler/scheduler_config.json").read_text())
    assert old.pop("prediction_type") == "epsilon" and old.pop("rescale_betas_zero_snr", False) is False
    scheduler.write_text(json.dumps(old))  # as configs of before these settings
    run_folder.look(train.read(["--model", base_models["sdxl"], "--teacher", str(other)]))
    with pytest.raises(UserError, match="leave it out of --stage reward"):
        train.read(["--stage", "reward", "--pairs", "x", "--teacher", str(other)]).check()


@pytest.mark.parametrize("base", NEW)
@pytest.mark.parametrize("flags", ["--stage 2", "--method dmdr", "--stage reward --pairs PAIRS"])
def test_what_needs_a_latent_reward_model_is_refused(flags, base, base_models, tmp_path, monkeypatch):
    """In one line, before anything is loaded."""
    if flags == "--stage 2":
        (tmp_path / "one" / "checkpoint-000001").mkdir(parents=True)
        (tmp_path / "one" / "checkpoint-000001" / "progress.json").write_text('{"loops": 1}')
        settings = vars(train.read(["--model", base_models[base]])) | {"t5": "off"}
        (tmp_path / "one" / "config.json").write_text(json.dumps(settings))
        flags += f" --init {tmp_path / 'one'}"
    argv = ["--model", base_models[base], "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="no latent reward model of its latents exists"):
        run_folder.look(train.read([*argv, *flags.replace("PAIRS", str(tmp_path)).split()]))


@pytest.mark.xdist_group("ranks")
def test_two_ranks_equal_one(base_models, tmp_path, two_ranks):
    """Whole weights, text from the cache; LoRAs and D's features: but for rounding the same steps.

    Each rank encodes its share of the prompts: the same cache to the bit.
    """
    words = tmp_path / "prompts.txt"
    words.write_text("a red circle\na large blue ring above a small red square\n")
    low = "--batch-size 2 --ttur 1 --log-every 1 --lr 2e-6 --fake-lr 1e-5 --iterations 2 --preview-every 0"
    cases = [f"--model {base_models['qwen']} {low} --method dmd2 --lora-rank 2"]
    cases += [f"--model {base_models['z-image']} {low} --gan-weight 0 --prompts {words} --cache-text {tmp_path}/kept-N"]
    out = lambda f, n, i: [*f.replace("-N", f"-{n}").split(), "--out", str(tmp_path / f"{n}-{i}")]  # noqa: E731
    runs = {n: [out(f, n, i) for i, f in enumerate(cases)] for n in (1, 2)}
    two_ranks(f"import train\nfor flags in {runs[2]!r}: train.train(train.read(flags))")
    for i, flags in enumerate(runs[1]):
        train.train(train.read(flags))
        one, two = ((tmp_path / f"{n}-{i}" / "metrics.jsonl").read_text().splitlines() for n in (1, 2))
        for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
            for key in {"dm_loss", "fake_loss", "d_loss", "g_norm", "fake_norm"} & a.keys():
                assert b[key] == pytest.approx(a[key], rel=2e-3), (i, key)
    kept = [{p.name: p.read_bytes() for p in (tmp_path / f"kept-{n}").glob("*/*.safetensors")} for n in (1, 2)]
    assert kept[0] == kept[1] and len(kept[0]) == 3


def test_a_frozen_network_in_8_bits(base_models, tmp_path):
    """--quantize-frozen int8: linear weights are within half a 127th of their row's largest; LoRAs train."""
    pytest.importorskip("torchao")
    flags = f"--model {base_models['z-image']} {SMALL} --quantize-frozen int8 --preview-every 0"
    nets = assemble(train.read(flags.split()), 1, torch.device("cpu"), train.prepare)
    words = [module for module in nets.encoder.encoders[0].modules() if isinstance(module, torch.nn.Linear)]
    assert words and all(in_8_bits(module.weight) for module in words)
    plain = load_denoiser(base_models["z-image"], resolution=64).net
    for name, p in plain.named_parameters():
        layer, _, kind = name.rpartition(".")
        found = nets.G.net.get_submodule(layer)
        kept = getattr(getattr(found, "base_layer", found), kind) if layer else getattr(nets.G.net, kind)
        if isinstance(plain.get_submodule(layer), torch.nn.Linear) and kind == "weight":
            assert in_8_bits(kept)
            assert ((kept.dequantize() - p).abs() <= 0.51 * p.abs().amax(1, keepdim=True) / 127).all()
        else:
            assert torch.equal(kept, p)
    whole, logged = trained(base_models["z-image"], tmp_path / "a", *flags.split()[-4:], "--iterations", "2")
    assert logged[-1]["skipped_updates"] == 0 and all(m["g_norm"] > 0 for m in logged if "dm_loss" in m)
    trained(base_models["z-image"], tmp_path / "b", *flags.split()[-4:], "--iterations", "1")
    half, _ = trained(base_models["z-image"], tmp_path / "b", *flags.split()[-4:], "--iterations", "2", "--resume")
    first, second = state(whole, tmp_path / "a.pt"), state(half, tmp_path / "b.pt")
    assert first.keys() == second.keys() and all(torch.equal(v, second[key]) for key, v in first.items())


@pytest.mark.xdist_group("ranks")
def test_two_ranks_with_a_network_in_8_bits(base_models, tmp_path, two_ranks):
    """FSDP2 leaves it whole; the LoRAs' steps are one process's."""
    pytest.importorskip("torchao")
    low = (
        "--batch-size 2 --ttur 1 --log-every 1 --lr 2e-6 --fake-lr 1e-5 --iterations 1 --preview-every 0 --lora-rank 2"
    )
    flags = f"--model {base_models['z-image']} {low} --quantize-frozen int8 --gan-weight 0".split()
    two_ranks(f"import train; train.train(train.read({[*flags, '--out', str(tmp_path / '2')]!r}))")
    train.train(train.read([*flags, "--out", str(tmp_path / "1")]))
    one, two = (json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0]) for n in "12")
    for key in ("dm_loss", "fake_loss", "g_norm", "fake_norm"):
        assert two[key] == pytest.approx(one[key], rel=2e-3), key
