"""Base models in the layouts and with the configs that people have: as diffusers has them, or refused by name."""

import inspect
import json
import os
import shutil
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import export
import train
from diffusion import backward_simulation, guided, randn, sample_generators, sample_ode, times
from engine import base_model, sdxl
from engine.errors import UserError
from engine.export import student_scheduler
from engine.models import load_denoiser, load_schedule, load_vae
from engine.pictures import generate
from engine.prompts import load_encoder

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def copied(folder, model="toy/sdxl", **changes):
    """A copy of a pipeline folder, its weights linked. changes: {a JSON's name, "/" as "__": its keys, None = gone}."""

    def link(a, b):
        return os.symlink(Path(a).resolve(), b) if a.endswith(".safetensors") else shutil.copy(a, b)

    shutil.copytree(model, folder, copy_function=link)
    for name, keys in changes.items():
        edit(Path(folder, name.replace("__", "/") + ".json"), keys)
    return folder


def edit(path, keys):
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


# ------------------------------------------------------------------------------------ layouts of weights


def renamed(path):
    path.rename(path.with_suffix(".fp16.safetensors"))


def in_shards(path, name="{}.fp16-{:05}-of-00002.safetensors"):
    """As diffusers and transformers write a sharded variant; an older diffusers had the variant behind the number."""
    weights, halves, table = load_file(path), [{}, {}], {}
    for i, (key, value) in enumerate(weights.items()):
        halves[i % 2][key] = value
        table[key] = name.format(path.stem, i % 2 + 1)
    for n, half in enumerate(halves, 1):
        save_file(half, path.with_name(name.format(path.stem, n)), {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    path.with_name(f"{path.stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
    path.unlink()


def in_old_shards(path):
    in_shards(path, "{}-{:05}-of-00002.fp16.safetensors")


def pickled(path):
    name = "pytorch_model" if path.stem == "model" else path.stem
    torch.save(load_file(path), path.with_name(f"{name}.bin"))
    path.unlink()


def beside_ema(path):
    """Plain weights go before those of a variant."""
    save_file({k: v + 1 for k, v in load_file(path).items()}, path.with_suffix(".ema.safetensors"), {"format": "pt"})


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("layout", [renamed, in_shards, in_old_shards, pickled, beside_ema])
def test_weights_in_other_layouts(layout, hub, shipped, tmp_path, monkeypatch):
    """The same networks, from a folder and by hub name from the hub's cache without a network."""
    name = model = tmp_path / "model"
    if hub:
        name, cache = "somebody/a-model", tmp_path / "hub"
        model = cache / "models--somebody--a-model" / "snapshots" / "0123"
        model.parent.mkdir(parents=True)
        (model.parents[1] / "refs").mkdir()
        (model.parents[1] / "refs" / "main").write_text("0123")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    copied(model)
    for path in [path for part in PARTS for path in (model / part).glob("*.safetensors")]:
        layout(path)
    base_model.check(name)
    nets = [load_denoiser(name).net, load_vae(name).net, *load_encoder(name, 64).encoders]
    for net, plain in zip(nets, shipped):
        found = net.state_dict()
        assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.fixture(scope="module")
def shipped():
    """The weights of the networks of toy/sdxl."""
    nets = load_denoiser("toy/sdxl").net, load_vae("toy/sdxl").net, *load_encoder("toy/sdxl", 64).encoders
    return [net.state_dict() for net in nets]


@pytest.mark.parametrize("part, value", [("unet", torch.nan), ("vae", torch.inf), ("text_encoder_2", torch.nan)])
def test_weights_that_are_not_finite_are_blamed(part, value, tmp_path, capsys):
    """Before training, by the name of their folder."""
    (path,) = copied(tmp_path / "model").joinpath(part).glob("*.safetensors")
    weights = load_file(path)
    key = next(key for key, w in weights.items() if w.dim() > 1)
    weights[key].view(-1)[7] = value
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    line = refused(capsys, tmp_path, "--model", tmp_path / "model")
    assert f"{part} of {tmp_path / 'model'} holds nan or inf, first in " in line and key.split(".")[-2] in line


# -------------------------------------------------------------------------------------- configs refused


def refused(capsys, tmp_path, *argv):
    """train.py's one line for a mistake; the run folder is not made."""
    with pytest.raises(SystemExit) as ended:
        train.main(["--batch-size", "2", "--gan-weight", "0", "--out", str(tmp_path / "run"), *map(str, argv)])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    return line


EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
REFUSED = [  # a file of toy/sdxl, its keys, and what the line says
    (INDEX, {"_class_name": "StableDiffusionXLInpaintPipeline"}, "is a StableDiffusionXLInpaintPipeline"),
    (INDEX, {"text_encoder": [None, None]}, "has no text_encoder (SDXL's refiner"),
    (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "its vae is a AutoencoderTiny"),
    (SCHEDULER, EDM, "is of a EDMEulerScheduler"),
    (SCHEDULER, EDM | {"_class_name": "EDMDPMSolverMultistepScheduler"}, "is of a EDMDPMSolverMultistepScheduler"),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "is of a FlowMatchEuler"),
    (SCHEDULER, {"prediction_type": "sample"}, "prediction_type 'sample'"),
    (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    (SCHEDULER, {"num_train_timesteps": 500}, "num_train_timesteps 500: only 1000"),
    (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
    (SCHEDULER, {"beta_schedule": "gone"}, "beta_schedule None"),
    (SCHEDULER, {"beta_start": "0.00085"}, "beta_start '0.00085': it must be a number"),
    (SCHEDULER, {"trained_betas": [0.1] * 10}, "trained_betas 'of length 10'"),
    (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing 'karras'"),
    (SCHEDULER, {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
    ("unet/config.json", {"in_channels": 9}, "in_channels 9, its VAE 4 latent channels: inpainting"),
    ("unet/config.json", {"out_channels": 8}, "out_channels 8"),
    ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds 10"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
    ("unet/config.json", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type 'ip_image_proj'"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 144}, "six sizes give 160"),
    ("unet/config.json", {"cross_attention_dim": 128}, "cross_attention_dim 128, its text encoders are 256"),
    ("vae/config.json", {"latent_channels": 16}, "in_channels 4, its VAE 16"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor 0.1"),
]
REFUSED_SD3 = [
    (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
    (SCHEDULER, {"shift_terminal": 0.02}, "shift_terminal 0.02"),
    (SCHEDULER, {"shift": "gone"}, "shift None"),
    (SCHEDULER, {"num_train_timesteps": 500}, "num_train_timesteps 500"),
    (SCHEDULER, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "is of a FlowMatchHeun"),
    ("vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
]
REFUSED_QWEN = [
    (INDEX, {"text_encoder": ["transformers", "Qwen3Model"]}, "its text_encoder is a Qwen3Model"),
    (SCHEDULER, {"time_shift_type": "cubic"}, "time_shift_type 'cubic'"),
    (SCHEDULER, {"base_shift": "0.5"}, "base_shift '0.5': it must be a number"),
    (SCHEDULER, {"invert_sigmas": True}, "invert_sigmas True"),
    ("transformer/config.json", {"zero_cond_t": True}, "zero_cond_t True, only False"),
    ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds True"),
    ("transformer/config.json", {"in_channels": 132}, "in_channels 132, its VAE 16 latent channels"),
    ("vae/config.json", {"z_dim": 48}, "its VAE 48 latent channels"),
]
REFUSED_Z_IMAGE = [
    (INDEX, {"_class_name": "ZImageOmniPipeline"}, "is a ZImageOmniPipeline"),
    (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
    ("transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim 8"),
    ("transformer/config.json", {"all_patch_size": [1]}, "all_patch_size [1]"),
    ("vae/config.json", {"latent_channels": 4}, "in_channels 16, its VAE 4"),
]
REFUSED_OF = {"toy/sdxl": REFUSED, "toy/sd3": REFUSED_SD3, "qwen": REFUSED_QWEN, "z-image": REFUSED_Z_IMAGE}


@pytest.mark.parametrize(
    "model, name, keys, words", [(model, *row) for model in REFUSED_OF for row in REFUSED_OF[model]]
)
def test_what_training_ignores_is_refused(model, name, keys, words, base_models, tmp_path, capsys, monkeypatch):
    """By train.py, before a network is loaded, and by whatever loads the denoiser."""
    copied(tmp_path / "model", base_models.get(model, model))
    edit(tmp_path / "model" / name, keys)
    monkeypatch.setattr(train, "assemble", None)
    assert words in refused(capsys, tmp_path, "--model", tmp_path / "model")
    with pytest.raises(UserError):
        load_denoiser(str(tmp_path / "model"))


def single(path):
    path.mkdir()
    (path / "sd_xl.safetensors").write_bytes(b"")


NO_PIPELINES = [  # how to make one, and what the line says
    (lambda path: path.with_suffix(".safetensors").write_bytes(b""), "from_single_file"),
    (single, "from_single_file"),
    (lambda path: shutil.copytree("toy/sdxl/unet", path), "a network alone"),
    (lambda path: shutil.copytree("toy/sdxl/unet", path / "unet"), "a network alone"),
    (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")), "a LoRA; merge"),
    (lambda path: (path / "checkpoint-000002" / "unet").mkdir(parents=True), "python export.py"),
    (lambda path: path.mkdir(), "such as toy/sdxl"),
]


@pytest.mark.parametrize("make, words", NO_PIPELINES)
def test_what_is_no_pipeline_folder_is_told_what_it_is(make, words, tmp_path, capsys):
    make(tmp_path / "model")
    (path,) = tmp_path.iterdir()
    line = refused(capsys, tmp_path, "--model", path)
    assert "lacks model_index.json" in line and words in line
    if "from_single_file" in words:  # the command is Python, and its two functions exist
        compile(line.split('python -c "')[1].rstrip('"'), "command", "exec")
        assert StableDiffusionXLPipeline.from_single_file and StableDiffusionXLPipeline.save_pretrained


# --------------------------------------------------------------------------------------- configs obeyed


@pytest.fixture
def scheduled(tmp_path):
    """A function that makes a pipeline folder of nothing but a scheduler's config."""

    def make(kind, config):
        (tmp_path / "scheduler").mkdir()
        (tmp_path / INDEX).write_text('{"_class_name": "StableDiffusionXLPipeline"}')
        kind.from_config(config).save_pretrained(tmp_path / "scheduler")
        written = json.loads((tmp_path / SCHEDULER).read_text()).keys() - {"_class_name"}
        edit(tmp_path / SCHEDULER, dict.fromkeys(written - config.keys(), "gone"))  # the class's own values
        return str(tmp_path)

    return make


def raw(x_t, t):
    """A smooth made-up network."""
    return torch.tanh(x_t * 0.7 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * x_t


DDIM = SDXL | {"clip_sample": False}
TRAILING = {"timestep_spacing": "trailing"}
V = {"prediction_type": "v_prediction", **TRAILING}
CONFIGS = [
    (EulerDiscreteScheduler, SDXL | {"timestep_spacing": "leading", "steps_offset": 1}),  # SDXL base's own
    (EulerDiscreteScheduler, SDXL),  # without a spacing: linspace
    (DDIMScheduler, DDIM),  # without: leading
    (EulerDiscreteScheduler, SDXL | V | {"rescale_betas_zero_snr": True}),
    (DDIMScheduler, DDIM | V | {"rescale_betas_zero_snr": True}),
    (DDIMScheduler, DDIM | V | {"beta_schedule": "linear"}),
    (DDIMScheduler, DDIM | TRAILING | {"beta_schedule": "squaredcos_cap_v2"}),
    (DDIMScheduler, DDIM | V | {"trained_betas": torch.linspace(1e-4, 0.01, 1000).tolist()}),
]


@pytest.mark.parametrize("kind, config", CONFIGS)
def test_schedules_are_diffusers(kind, config, scheduled):
    """10 steps of the teacher by diffusers' own scheduler; 4 of a student by the scheduler that its export has.

    The first step is given the same noise: diffusers scales it by σ_t where its timesteps are not "leading".
    """
    folder = scheduled(kind, config)
    schedule, theirs = load_schedule(folder), kind.from_pretrained(folder, subfolder="scheduler")
    denoiser = lambda x_t, t, c: schedule.x_0(raw(x_t, t), x_t, t)  # noqa: E731
    denoiser.schedule = schedule
    generators = sample_generators(7, 0, range(3), "test")
    z = randn(generators, torch.empty(3, 4, 8, 8))

    theirs.set_timesteps(10)
    assert schedule.sampler_steps(10).tolist() == theirs.timesteps.tolist()
    x = z * (theirs.sigmas[0] ** 2 + 1) ** 0.5 if kind is EulerDiscreteScheduler else z
    for t in theirs.timesteps:
        x = theirs.step(raw(theirs.scale_model_input(x, t), times(t, x)), t, x).prev_sample
    torch.testing.assert_close(sample_ode(denoiser, z, None, 10), x, atol=2e-3, rtol=1e-3)

    edit(Path(folder, SCHEDULER), {"clip_sample": True, "thresholding": True})  # of samplers, not of the model
    lcm = student_scheduler(folder, 4)
    lcm.set_timesteps(4)
    ours = backward_simulation(denoiser, z, None, schedule.steps(4), sample_generators(8, 0, range(3), "test"))
    x, generators = z, sample_generators(8, 0, range(3), "test")
    for t in lcm.timesteps:
        x = lcm.step(raw(x, times(t, x)), t, x, generator=generators).prev_sample
    torch.testing.assert_close(ours, x, atol=5e-3, rtol=2e-3)


def test_spacings_of_configs_without_one_are_diffusers():
    for name, spacing in sdxl.SPACINGS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        if "timestep_spacing" in parameters:  # not where diffusers stands in for a scheduler whose package is missing
            assert parameters["timestep_spacing"].default == spacing, name
            assert parameters["prediction_type"].default == "epsilon", name


def test_a_pipelines_configs_are_obeyed(tmp_path):
    """The null prompt encoded, latents scaled per channel, another spacing: guided pictures are the pipeline's own."""
    mean, std = [0.2, -0.1, 0.3, 0.0], [0.8, 1.2, 0.9, 1.1]
    spacing = {"timestep_spacing": "leading", "steps_offset": 1}
    stats = {"latents_mean": mean, "latents_std": std}
    changes = {"model_index": {"force_zeros_for_empty_prompt": False}, "vae__config": stats}
    model = copied(tmp_path / "model", scheduler__scheduler_config=spacing, **changes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, generators = ["a red circle", "a large blue ring"], sample_generators(0, 0, range(2), "sample")
    how = {"height": 64, "width": 64, "output_type": "pt", "generator": generators}
    theirs = pipeline(prompts, num_inference_steps=8, guidance_scale=3.0, **how).images * 2 - 1
    encoder, vae = load_encoder(str(model), 64), load_vae(str(model))
    teacher = guided(load_denoiser(str(model)), encoder.null(), 3.0)
    ours = generate(teacher, encoder, vae, prompts, 8, 0, ode=True)
    assert (ours - theirs.clamp(-1, 1)).abs().max() < 2 / 255
    plain = load_vae("toy/sdxl").encode(ours)
    wanted = (plain / 0.4938 - torch.tensor(mean).view(-1, 1, 1)) * 0.4938 / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(vae.encode(ours), wanted, atol=1e-5, rtol=1e-4)


def test_export_of_a_model_that_is_gone(tmp_path, capsys):
    """One line, and nothing written, before torch is loaded."""
    (tmp_path / "run" / "checkpoint-000002").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-000002" / "progress.json").write_text('{"loops": 2}')
    (tmp_path / "run" / "config.json").write_text(json.dumps({"stage": 1, "method": "flash", "model": "toy/gone"}))
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "no such folder: toy/gone" in capsys.readouterr().err and not (tmp_path / "out").exists()
