"""SD3, on an untrained pipeline of the toy's size: sampling is diffusers'; stage 1, export; a wrong shift shows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import sample
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


@pytest.fixture(scope="module")
def folders(sd3, sd3_t5):
    """Pipeline folder by kind."""
    return {"no T5": sd3, "T5": sd3_t5}


def plain(folder):
    """Diffusers' own pipeline."""
    lacking = json.loads(Path(folder, "model_index.json").read_text())["text_encoder_3"][-1] is None
    without = {"text_encoder_3": None, "tokenizer_3": None} if lacking else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(channels, side):
    """The samples' own, (2, C, h, w)."""
    return torch.stack(
        [torch.randn(channels, side, side, generator=g) for g in sample_generators(0, 0, range(2), "sample")]
    )


def diffusers_picture(pipeline, steps, guidance, length, seed=0):
    """What a diffusers user gets for PROMPTS, in [-1, 1]: latents from the samples' noise, later noise is torch's."""
    net = pipeline.transformer.config
    latents = noise(net.in_channels, net.sample_size)
    torch.manual_seed(seed)
    sigmas = [n / steps for n in range(steps, 0, -1)]
    settings = {"sigmas": sigmas, "max_sequence_length": length, "height": 64, "width": 64, "output_type": "pt"}
    return (pipeline(PROMPTS, guidance_scale=guidance, latents=latents, **settings).images * 2 - 1).clamp(-1, 1)


@pytest.mark.parametrize("kind, length, lengths", [("no T5", 32, []), ("T5", 256, [128]), ("T5", 128, [256])])
def test_multi_step_sampling_is_diffusers(kind, length, lengths, folders):
    """Guided Euler steps: prompt encoding, the null prompt, shift and sigmas agree.

    With another shift, or another length of T5's tokens, they do not.
    """
    folder = folders[kind]
    encoder, vae, denoiser = load_encoder(folder, 64, text_length=length), load_vae(folder), load_denoiser(folder)
    assert denoiser.schedule.prediction == "flow" and denoiser.schedule.shift == 3.0
    ours = generate(guided(denoiser, encoder.null(), 4.0), encoder, vae, PROMPTS, 6, 0, ode=True)
    pipeline = plain(folder)
    assert (ours - diffusers_picture(pipeline, 6, 4.0, length)).abs().max() < 2 / 255
    for other in lengths:
        assert (ours - diffusers_picture(pipeline, 6, 4.0, other)).abs().max() > 20 / 255
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert (ours - diffusers_picture(pipeline, 6, 4.0, length)).abs().max() > 20 / 255


def test_a_prompt_draws_alone_what_it_draws_among_others(sd3_t5):
    """One of 2 letters and one that is cut off; without a mask, neither sees the other's length."""
    encoder, vae, net = load_encoder(sd3_t5, 64), load_vae(sd3_t5), load_denoiser(sd3_t5)
    teacher = guided(net, encoder.null(), 4.0)
    prompts = ["it", "a large blue ring above a small red square. " * 9]
    together = generate(teacher, encoder, vae, prompts, 4, 0, ode=True)
    for i, prompt in enumerate(prompts):
        alone = generate(teacher, encoder, vae, [prompt], 4, 0, first=i, ode=True)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 20 / 255


@pytest.fixture(scope="module")
def run(sd3, tmp_path_factory):
    """Two loops of stage 1."""
    return train_two_loops(sd3, tmp_path_factory)


def train_two_loops(folder, tmp_path_factory, *more):
    out = tmp_path_factory.mktemp("stage-1") / "run"
    flags = f"--model {folder} --iterations 2 --batch-size 2 --log-every 1 --preview-every 2 --out {out}"
    return train.train(train.read([*flags.split(), *more]))


@pytest.fixture(scope="module")
def runs(run, sd3_t5, tmp_path_factory):
    """A run by kind; T5 reads 100 tokens."""
    return {"no T5": run, "T5": train_two_loops(sd3_t5, tmp_path_factory, "--text-length", "100")}


@pytest.mark.parametrize("kind, length", [("no T5", 32), ("T5", 100)])
def test_stage_1_and_export(kind, length, folders, runs, tmp_path):
    """The student reloads in plain diffusers with its scheduler, and draws our own picture from the same noise.

    T5's length is the run's, in its settings, in sample.py and on the card.
    """
    folder, run = folders[kind], runs[kind]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["dm_loss"] for m in logged if "dm_loss" in m]
    assert len(losses) == 2 and min(losses) > 0 and logged[-1]["skipped_updates"] == 0
    assert (run / "preview-000002.png").is_file()
    settings = run_folder.saved_settings(run)
    assert settings["t5"] == ("on" if kind == "T5" else "off")
    encoder, vae, student = sample.load(run_folder.newest(run), settings, str(folder), torch.float32, "cpu")
    before = load_denoiser(folder).net.state_dict()
    assert any(not torch.equal(p, before[name]) for name, p in student.net.state_dict().items())

    out = export(run, tmp_path / "student")
    pipeline = plain(out)
    assert pipeline.scheduler.config.stochastic_sampling and pipeline.scheduler.config.shift == 3.0
    card = (out / "README.md").read_text()
    assert f"sigmas=[1.0, 0.75, 0.5, 0.25], max_sequence_length={length}" in card
    assert ("text_encoder_3=None" in card) == (kind == "no T5") == (pipeline.text_encoder_3 is None)
    theirs = diffusers_picture(pipeline, 4, 0, length, seed=5)
    S, z = student.schedule.steps(4), noise(vae.channels, 64 // vae.factor)
    torch.manual_seed(5)  # that pipeline gives its scheduler no generator
    with torch.no_grad():
        for i, t in enumerate(S):
            x_0 = student(z, t.expand(2), encoder.encode(PROMPTS))
            if i + 1 < len(S):
                s = S[i + 1] / 1000
                z = (1 - s) * x_0 + s * torch.randn(x_0.shape)
        ours = vae.decode(x_0).clamp(-1, 1)
    assert (ours - theirs).abs().max() < 2 / 255
    if kind == "T5":
        assert (ours - diffusers_picture(pipeline, 4, 0, 256, seed=5)).abs().max() > 20 / 255


def lacking(folder, tmp_path, name):
    """A copy of a pipeline folder without a part."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(name))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "flags, why",
    [
        ("--model toy/sd3 --t5 on", "toy/sd3 has no text_encoder_3"),
        ("--model toy/sdxl --t5 on", "toy/sdxl has no text_encoder_3"),
        ("--model LACKS:text_encoder_3", "lacks text_encoder_3/config.json .*, or pass --t5 off"),
        ("--model LACKS:tokenizer_3", "lacks tokenizer_3 .*, or pass --t5 off"),
        ("--model LACKS:tokenizer_3 --t5 on", "lacks tokenizer_3 .*again\\)$"),
        ("--text-length 0", "--text-length must lie in 1 to 512"),
        ("--text-length 513", "--text-length must lie in 1 to 512"),
        ("--model T5 --resume --out RUN --text-length 256", "was trained with --text-length 100, not 256"),
        ("--model T5 --resume --out RUN --t5 off", "was trained with --t5 on, not off"),
    ],
)
def test_t5_is_refused_in_one_line(flags, why, sd3_t5, runs, tmp_path):
    flags = flags.replace("RUN", str(runs["T5"])).replace("T5 ", f"{sd3_t5} ").split()
    if ":" in "".join(flags[:2]):
        flags[1] = str(lacking(sd3_t5, tmp_path, flags[1].split(":")[1]))
    with pytest.raises(UserError, match=why):
        run_folder.look(train.read(flags))


def test_t5_off_needs_no_t5(sd3_t5, tmp_path):
    """Without its folder: zeros in its place, as many as CLIP's tokens; a run of before --t5 counts as off."""
    folder = lacking(sd3_t5, tmp_path, "*_3")
    assert run_folder.look(train.read(["--model", str(folder), "--t5", "off"])).t5 == "off"
    tokens = load_encoder(folder, 64, t5="off").encode(PROMPTS)["tokens"]
    assert tokens.shape == (2, 154, 64) and tokens[:, :77].any() and not tokens[:, 77:].any()
    (tmp_path / "config.json").write_text(json.dumps({"model": str(sd3_t5), "method": "flash"}))
    assert run_folder.saved_settings(tmp_path)["t5"] == "off"


def test_a_student_of_t5_wants_a_model_with_t5(sd3, runs):
    with pytest.raises(UserError, match="has no text_encoder_3"):
        sample.plan(sample.flags(["--run", str(runs["T5"]), "--model", str(sd3)]))


def test_prompts_that_are_cut_off_are_counted(sd3_t5, capsys):
    """T5 reads 20 letters and the end; CLIP's 77 words are not what counts beside it. Told at the 1st and the 10th."""
    encoder = load_encoder(sd3_t5, 64, text_length=21)
    encoder.encode(["ab" * 10, "a" * 19, "abc" * 7])  # a word begins with a token of its own
    told = capsys.readouterr().err
    assert "warning: 2 of 3 prompts so far are cut off after 21 tokens, one of them: 'abab" in told
    encoder.encode(["abc" * 7] * 7)
    assert "cut off" not in capsys.readouterr().err
    encoder.encode(["abc" * 7, "a"])
    assert "warning: 10 of 12 prompts so far are cut off" in capsys.readouterr().err
    load_encoder(sd3_t5, 64, text_length=512).encode(["red " * 80])
    assert "cut off" not in capsys.readouterr().err


def test_stage_2_without_a_reward_model_is_refused(sd3, run, tmp_path):
    flags = f"--model {sd3} --stage 2 --init {run} --batch-size 2 --out {tmp_path / 'two'}"
    with pytest.raises(UserError, match="no latent reward model in .*sd3_lrm: name its folder with --reward"):
        train.train(train.read(flags.split()))


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
