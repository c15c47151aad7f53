"""SD3, on an untrained pipeline of the toy's size: sampling is diffusers'; stage 1, export; a wrong shift shows."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import train
from diffusion import guided, sample_generators
from engine import config, run_folder
from engine.errors import UserError
from engine.export import export
from engine.models import load_denoiser, load_vae
from engine.networks import assemble
from engine.pictures import generate
from engine.prompts import load_encoder
from toy import build, world

PROMPTS = ["a red circle", "a large blue ring"]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A pipeline folder: the toy's VAE and text encoders, a transformer with random weights."""
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=256,
        caption_projection_dim=32,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    vae = AutoencoderKL.from_pretrained("toy/sdxl/vae")
    vae.register_to_config(shift_factor=0.0)
    text = CLIPTextModelWithProjection.from_pretrained("toy/sdxl/text_encoder_2")
    words = CLIPTokenizer.from_pretrained("toy/sdxl/tokenizer")
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text,
        text_encoder_2=text,
        tokenizer=words,
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


def diffusers_picture(pipeline, steps, guidance, generators=None, seed=0):
    """What a diffusers user gets for PROMPTS, in [-1, 1]: latents from the samples' noise, later noise is torch's."""
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators])
    torch.manual_seed(seed)
    sigmas = [n / steps for n in range(steps, 0, -1)]
    settings = {"sigmas": sigmas, "max_sequence_length": 32, "height": 64, "width": 64, "output_type": "pt"}
    return pipeline(PROMPTS, guidance_scale=guidance, latents=latents, **settings).images * 2 - 1


def test_multi_step_sampling_is_diffusers(sd3):
    """Guided Euler steps: prompt encoding, the null prompt, shift and sigmas agree; with another shift they do not."""
    encoder, vae, denoiser = load_encoder(sd3, 64), load_vae(sd3), load_denoiser(sd3)
    assert denoiser.schedule.prediction == "flow" and denoiser.schedule.shift == 3.0
    ours = generate(guided(denoiser, encoder.null(), 4.0), encoder, vae, PROMPTS, 6, 0, ode=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        sd3, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    theirs = diffusers_picture(pipeline, 6, 4.0, sample_generators(0, 0, range(2), "sample"))
    assert (ours - theirs.clamp(-1, 1)).abs().max() < 2 / 255
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    wrong = diffusers_picture(pipeline, 6, 4.0, sample_generators(0, 0, range(2), "sample"))
    assert (ours - wrong.clamp(-1, 1)).abs().max() > 20 / 255


@pytest.fixture(scope="module")
def run(sd3, tmp_path_factory):
    """Two loops of stage 1."""
    out = tmp_path_factory.mktemp("stage-1") / "run"
    flags = f"--model {sd3} --iterations 2 --batch-size 2 --log-every 1 --preview-every 2 --out {out}"
    return train.train(train.read(flags.split()))


def test_stage_1_and_export(sd3, run, tmp_path):
    """The student reloads in plain diffusers with its scheduler, and draws our own picture from the same noise."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["dm_loss"] for m in logged if "dm_loss" in m]
    assert len(losses) == 2 and min(losses) > 0 and logged[-1]["skipped_updates"] == 0
    assert (run / "preview-000002.png").is_file()
    student = load_denoiser(sd3, student=run_folder.newest(run))
    before = load_denoiser(sd3).net.state_dict()
    assert any(not torch.equal(p, before[name]) for name, p in student.net.state_dict().items())

    out = export(run, tmp_path / "student")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        out, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    assert pipeline.scheduler.config.stochastic_sampling and pipeline.scheduler.config.shift == 3.0
    assert "sigmas=[1.0, 0.75, 0.5, 0.25], max_sequence_length=32" in (out / "README.md").read_text()
    theirs = diffusers_picture(pipeline, 4, 0, sample_generators(0, 0, range(2), "sample"), seed=5)
    encoder, vae, S = load_encoder(sd3, 64), load_vae(sd3), student.schedule.steps(4)
    z = torch.stack([torch.randn(4, 16, 16, generator=g) for g in sample_generators(0, 0, range(2), "sample")])
    torch.manual_seed(5)  # that pipeline gives its scheduler no generator
    with torch.no_grad():
        for i, t in enumerate(S):
            x_0 = student(z, t.expand(2), encoder.encode(PROMPTS))
            if i + 1 < len(S):
                s = S[i + 1] / 1000
                z = (1 - s) * x_0 + s * torch.randn(x_0.shape)
        ours = vae.decode(x_0)
    assert (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).abs().max() < 2 / 255


def test_stage_2_without_a_reward_model_is_refused(sd3, run, tmp_path):
    flags = f"--model {sd3} --stage 2 --init {run} --batch-size 2 --out {tmp_path / 'two'}"
    with pytest.raises(UserError, match="no latent reward model in .*sd3_lrm: name its folder with --reward"):
        train.train(train.read(flags.split()))


@pytest.mark.parametrize("method", ["dmd2", "advdmd"])
def test_a_gan_on_the_bottleneck_is_refused(method, sd3, tmp_path):
    flags = f"--model {sd3} --method {method} --batch-size 4 --out {tmp_path / 'run'}"
    with pytest.raises(UserError, match=f"--method {method} .*bottleneck"):
        train.train(train.read(flags.split()))
    assert not (tmp_path / "run").exists()


def test_the_toy_teacher_draws_its_prompts():
    """toy/sd3 draws 12 held-out prompts in 10 guided steps, and one in plain diffusers."""
    prompts = [world.scene(i, "test")[1] for i in range(12)]
    encoder, vae, denoiser = load_encoder("toy/sd3", 64), load_vae("toy/sd3"), load_denoiser("toy/sd3")
    pictures = generate(guided(denoiser, encoder.null(), 5.0), encoder, vae, prompts, 10, 0, ode=True)
    assert sum(world.judge(pictures, prompts)[0]) >= 11
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        "toy/sd3", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "max_sequence_length": 16, "output_type": "pt"}
    settings = {"num_inference_steps": 28, "guidance_scale": 5.0, **size}
    picture = pipeline(prompts[0], generator=torch.Generator().manual_seed(0), **settings).images * 2 - 1
    assert world.judge(picture, prompts[:1])[0] == [True]


def test_size_conditions_are_sdxl_s(sd3):
    with pytest.raises(UserError, match="no size conditions"):
        assemble(config.Config(model=str(sd3), data="pictures", size_condition="original"), 1, torch.device("cpu"))


def test_unknown_pipeline_is_named(sd3, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(sd3, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline"):
        load_denoiser(other)


@pytest.mark.parametrize(
    "flags, built, left",
    [
        ([], [], ["vae", "clip", "teacher", "sam", "lrm", "sd3", "sd3_lrm", "student"]),
        (
            ["--rebuild"],
            ["vae", "clip", "teacher", "sam", "lrm", "sd3", "sd3_lrm", "student"],
            ["vae", "clip", "teacher", "sam", "lrm", "sd3", "sd3_lrm", "student"],
        ),
        (["--only", "vae", "--rebuild"], ["vae"], ["vae", "clip", "sam"]),
        (["--only", "teacher", "--rebuild"], ["teacher"], ["vae", "clip", "teacher", "sam", "sd3", "sd3_lrm"]),
        (
            ["--only", "sd3", "--rebuild"],
            ["sd3"],
            ["vae", "clip", "teacher", "sam", "lrm", "sd3", "student"],
        ),
    ],
)
def test_no_part_outlives_what_it_was_trained_on(flags, built, left, tmp_path, monkeypatch):
    """toy.build, with parts that take no time: toy/sd3's VAE and text encoders are toy/sdxl's, by links."""
    calls, quality = [], tmp_path / "quality.json"

    def part(name, folder, parts):
        def make():
            assert all((tmp_path / build.PARTS[p][0]).is_dir() for p in parts)
            calls.append(name)
            (tmp_path / folder).mkdir(parents=True)
            quality.write_text(json.dumps(json.loads(quality.read_text()) | {name: {}}))

        return folder, make, parts

    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(
        build, "PARTS", {name: part(name, folder, parts) for name, (folder, _, parts) in build.PARTS.items()}
    )
    quality.write_text("{}")
    build.main([])
    calls.clear()
    build.main(flags)
    assert calls == built and sorted(json.loads(quality.read_text())) == sorted(left)
    assert [name for name, (folder, *_) in build.PARTS.items() if (tmp_path / folder).is_dir()] == left
