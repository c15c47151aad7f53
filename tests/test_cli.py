"""Mistakes of a user: one clear line, exit status 2, nothing overwritten."""

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from transformers import CLIPModel, CLIPTokenizer

import evaluate
import sample
import train
from engine import benchmark, checkpoint, config, data, pictures, run_folder, safe_load
from engine.errors import UserError
from engine.prompts import PromptEncoder
from toy import world

SMALL = ["--iterations", "2", "--batch-size", "2", "--preview-every", "0", "--log-every", "1"]


def call(main, capsys, *argv):
    """Run a script's main() with argv -> its exit status and the last line that it printed."""
    old, sys.argv = sys.argv, ["script", *map(str, argv)]
    try:
        main()
        status = 0
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = old
    text = capsys.readouterr()
    assert "Traceback" not in text.err
    lines = (text.err if status else text.out).strip().splitlines()
    return status, next(
        (line for line in lines if line.startswith("error:")), lines[-1]
    )  # a progress bar may end below it


@pytest.fixture
def photos(tmp_path):
    """A folder of ten captioned pictures that are not square."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(10):
        scene, caption = world.scene(i, "train")
        pictures.to_pil(world.render(scene)).resize((96, 80)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--preset", "huge"], "huge"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--sam", "toy/nothing"], "toy/nothing"),
        (["--renoise", "0.9,0.1"], "renoise"),
        (["--cache-latents", "kept"], "--gan-reals vae"),
        (["--cache-latents", "kept", "--gan", "latent"], "the toy world"),
        (["--cache-latents", "README.md", "--gan", "latent", "--data", "tests"], "is a file"),
        (["--size-condition", "original"], "captions of their own"),
        (["--judge", "runs/none"], "--gan online"),
        (["--ema", "2"], "--ema"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "0"], "--lr"),
        (["--sam", "somebody/sam-huge"], "somebody/sam-huge"),
        (["--resolution", "66", "--data", "toy"], "64 pixels"),
        (["--iterations", "0"], "--iterations"),
        (["--student-steps", "5"], "student-steps"),
        (["--resume"], "--out"),
        (["--resolution", "128"], "64 pixels"),
        (["--data", "toy/nothing"], "metadata.jsonl"),
    ],
)
def test_bad_flags(argv, words, capsys, tmp_path):
    out = tmp_path / "run"
    status, line = call(train.main, capsys, *SMALL, *(["--out", out] if "--resume" not in argv else []), *argv)
    assert status == 2 and words in line and not out.exists()


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--steps", "0"], ["--num", "0"], ["--num", "many"]])
def test_bad_numbers(main, argv, capsys):
    status, line = call(main, capsys, *argv)
    assert status == 2 and f"{argv[0]}: " in line and argv[1] in line


@pytest.mark.parametrize(
    "lost", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae", "model_index.json", "tokenizer_2"]
)
def test_half_written_model_folder(lost, capsys, tmp_path):
    model = shutil.copytree("toy/sdxl", tmp_path / "model")
    shutil.rmtree(model / lost) if (model / lost).is_dir() else (model / lost).unlink()
    status, line = call(train.main, capsys, *SMALL, "--model", model, "--out", tmp_path / "run")
    assert status == 2 and lost.split("/")[0] in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, words",
    [("model_index.json", "only StableDiffusion"), ("scheduler/scheduler_config.json", "scheduler_config.json")],
)
def test_emptied_config(name, words, capsys, tmp_path):
    model = shutil.copytree("toy/sdxl", tmp_path / "model")
    (model / name).write_text("{}")
    status, line = call(train.main, capsys, *SMALL, "--model", model, "--out", tmp_path / "run")
    assert status == 2 and words in line and not (tmp_path / "run").exists()


def test_cut_short_weights(capsys, tmp_path):
    model = shutil.copytree("toy/sdxl", tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    status, line = call(train.main, capsys, *SMALL, "--model", model, "--out", tmp_path / "run")
    assert status == 2 and "unet" in line and not (tmp_path / "run").exists()


def test_hub_out_of_reach(capsys, tmp_path):
    """A hub name without the hub: the line says to give a folder."""
    status, line = call(train.main, capsys, *SMALL, "--model", "nobody/no-such-model", "--out", tmp_path / "run")
    assert (
        status == 2
        and "nobody/no-such-model from the hub" in line
        and "give its folder" in line
        and not (tmp_path / "run").exists()
    )


def test_pickled_weights_are_not_run(capsys, tmp_path):
    """A SAM checkpoint that would run code when unpickled: refused, and not run."""
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save({"weights": Malicious(tmp_path / "run by torch.load")}, path)
    status, line = call(train.main, capsys, *SMALL, "--sam", path, "--out", tmp_path / "run")
    assert (
        status == 2
        and str(path) in line
        and not (tmp_path / "run by torch.load").exists()
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("rank", ["", "__0"])
def test_pickled_checkpoints_are_not_run(rank, tmp_path):
    """Neither a checkpoint's table of contents, of all ranks or of one, nor what else torch.distributed.checkpoint pickles."""
    net = torch.nn.Linear(2, 2)
    player, proof = {"G": (net, torch.optim.AdamW(net.parameters()))}, tmp_path / "run by pickle"
    checkpoint.save(tmp_path, player, {"loops": 1}, write=lambda *_: None)
    assert checkpoint.restore(tmp_path, player) == {"loops": 1}
    whole = tmp_path / "checkpoint-000001" / "state" / ".metadata"
    table = whole.rename(whole.with_name(f"{rank}.metadata"))
    table.write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(UserError, match="names pathlib.Path.touch"):
        checkpoint.restore(tmp_path, player)
    content = io.BytesIO()
    torch.save(Malicious(proof), content)
    content.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        safe_load.Planner().load_bytes(None, content)
    assert not proof.exists()


@pytest.mark.parametrize(
    "kind, name, read", [(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT", True), (Path, "touch", False)]
)
def test_enums_in_a_checkpoint_of_python_3_11_2(kind, name, read):
    """Which pickles an enum's member as getattr of the enum: read, where it is that; any other attribute is refused."""
    table = pickle.dumps(Attribute(kind, name))
    if read:
        assert safe_load.Metadata(io.BytesIO(table)).load() is kind[name]
    else:
        with pytest.raises(pickle.UnpicklingError):
            safe_load.Metadata(io.BytesIO(table)).load()


class Attribute:
    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


PAPER = {  # the paper's tables: stage, batch, iterations, TTUR, student steps, whether LoRAs
    "sdxl-4step": (1, 64, 1000, 1, 4, False),
    "sdxl-4step-ttur2": (1, 64, 4000, 2, 4, False),
    "sdxl-4step-ttur5": (1, 64, 18000, 5, 4, False),
    "sdxl-8step": (1, 48, 3000, 2, 8, False),
    "sd3-4step": (1, 32, 4000, 2, 4, True),
    "sdxl-stage2": (2, 64, 5000, 1, 4, False),
    "sdxl-8step-stage2": (2, 48, 3000, 1, 8, False),
    "sdxl-dmd2": (1, 128, 24000, 5, 4, False),
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_papers(preset):
    c = config.parse(["--preset", preset])
    assert (c.stage, c.batch_size, c.iterations, c.ttur, c.student_steps, bool(c.lora_rank)) == PAPER[preset]
    assert c.guidance == (7 if c.lora_rank else 8) and c.resolution == 1024  # Table 2's teacher; DMD2's w
    assert config.parse(["--preset", preset, "--ttur", "3"]).ttur == 3


def test_out_of_memory_is_named(capsys, tmp_path, monkeypatch):
    """An allocation that the machine refuses, inside a network or an optimizer: which, in whose turn, how many samples, and what helps."""
    real, real_step, casts = UNet2DConditionModel.forward, torch.optim.AdamW.step, []
    monkeypatch.setattr(train, "assemble", lambda *args, real=train.assemble: casts.append(real(*args)) or casts[-1])

    def full(self, *args, **kwargs):
        owners = (
            {id(casts[-1].fake.net): "fake", id(casts[-1].teacher.net): "teacher", id(casts[-1].players["D"][1]): "D"}
            if casts
            else {}
        )
        if owners.get(id(self)) == failing:
            return torch.empty(2**50)
        return (real if isinstance(self, UNet2DConditionModel) else real_step)(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    named = {
        "fake": "the score estimator, in generator_turn",
        "teacher": "the teacher, in generator_turn",
        "D": "the optimizer step of D, in distil",
    }
    for failing in named:
        status, line = call(train.main, capsys, *SMALL, "--out", tmp_path / "run", "--overwrite")
        assert status == 2 and all(
            word in line for word in (named[failing], "2 samples", "--micro-batch", "--checkpointing", "--gan-crop")
        ), line


def test_batch_not_divisible_by_ranks(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "start_process", lambda: (0, 3, torch.device("cpu")))
    status, line = call(train.main, capsys, *SMALL, "--out", tmp_path / "run")
    assert status == 2 and "divisible by 3" in line


def test_8_bit_moments_want_the_same_ranks(tmp_path):
    config_ = config.Config(optimizer="adamw8bit", resume=True, out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(vars(config_)))
    (tmp_path / "checkpoint-000002").mkdir()
    for ranks, refused in ((1, False), (2, True)):
        (tmp_path / "checkpoint-000002" / "progress.json").write_text(json.dumps({"loops": 2, "ranks": ranks}))
        line = run_folder.refusal(config_, tmp_path)
        assert bool(line) == refused
    assert "2 ranks, not 1" in line


def test_restart_by_torchrun_goes_on_with_its_own_run(capsys, monkeypatch, tmp_path):
    """--max-restarts asks for --out; what this torchrun has begun goes on without --resume, another's run is refused, also at a restart."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    status, line = call(train.main, capsys, *SMALL)
    assert status == 2 and "--max-restarts needs --out" in line
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert not config.parse(out).resume
    config_ = config.parse([*out, "--lr", "1e-3"])
    (run_folder.open_run(config_, 0) / "config.json").write_text(json.dumps(vars(config_)))
    assert not config.parse(out).resume  # a second command under the same --rdzv-id, as in a Slurm job of two
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = config.parse(out)
    assert again.resume and again.lr == 1e-3 and run_folder.refusal(again, tmp_path / "run") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert "is not empty" in run_folder.refusal(config.parse(out), tmp_path / "run")


def test_run_folder_is_never_overwritten_unasked(capsys, tmp_path):
    out = tmp_path / "run"
    assert call(train.main, capsys, *SMALL, "--out", out)[0] == 0
    before = (out / "metrics.jsonl").read_text()
    status, line = call(train.main, capsys, *SMALL, "--out", out)
    assert status == 2 and "--resume" in line and "--overwrite" in line
    for keep in (tmp_path, tmp_path / "file.txt"):  # not run folders: --overwrite must not delete them
        (tmp_path / "file.txt").write_text("mine")
        assert (
            call(train.main, capsys, *SMALL, "--out", keep, "--overwrite")[0] == 2 and (tmp_path / "file.txt").exists()
        )
    model = shutil.copytree("toy/sdxl", tmp_path / "other")
    status, line = call(train.main, capsys, *SMALL, "--out", out, "--resume", "--model", model)
    assert status == 2 and "--model" in line and "toy/sdxl" in line
    assert (out / "metrics.jsonl").read_text() == before

    status, line = call(sample.main, capsys, "--run", out, "--prompt", " ")
    assert status == 2 and "empty" in line
    status, line = call(
        sample.main, capsys, "--run", out, "--prompt", "a red circle " * 30, "--out", tmp_path / "pictures"
    )
    assert status == 0 and (tmp_path / "pictures" / "00000.png").exists() and "seconds per image" in line
    status, line = call(sample.main, capsys, "--run", out, "--out", tmp_path / "pictures")
    assert status == 2 and "holds something" in line
    status, _ = call(evaluate.main, capsys, "--run", out, "--num", "16", "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    keys = "prompt_accuracy attribute_accuracy frechet precision recall clip_score reward saturation contrast nfe seconds_per_image num seed real"
    assert status == 0 and sorted(found) == sorted(keys.split()) and found["nfe"] == 4 and found["num"] == 16


def test_bare_commands_take_the_newest_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        assert call(train.main, capsys, *SMALL, "--gan-weight", "0", "--out", f"runs/{name}")[0] == 0
    assert call(sample.main, capsys, "--run", "runs/old", "--num", "1")[0] == 0
    for name, saved in (("reward", '{"stage": "reward"}'), ("torn", '{"stage": 1, ')):  # newer, and no students
        shutil.copytree("runs/new", f"runs/{name}")
        Path("runs", name, "config.json").write_text(saved)
    status, line = call(sample.main, capsys, "--steps", "4")
    assert status == 0 and "runs/new/samples" in line
    for main, argv in ((sample.main, ["--run", "runs/torn"]), (train.main, ["--resume", "--out", "runs/torn"])):
        status, line = call(main, capsys, *argv)
        assert status == 2 and "config.json" in line and "torn" in line
    stage_2 = [
        "--stage",
        "2",
        "--gan-weight",
        "0",
        "--init",
        "runs/old",
        "--out",
        "runs/new",
        "--overwrite",
        "--clip",
        "toy/nothing",
    ]
    status, line = call(train.main, capsys, *stage_2)
    assert (
        status == 2 and "toy/nothing" in line and Path("runs/new/metrics.jsonl").exists()
    )  # not replaced by a run that cannot start


def test_resume_keeps_the_runs_settings(capsys, tmp_path):
    out = tmp_path / "run"
    assert (
        call(train.main, capsys, *SMALL, "--ttur", "2", "--renoise", "0.1,0.9", "--gan-weight", "0", "--out", out)[0]
        == 0
    )
    assert call(train.main, capsys, "--resume", "--out", out, "--iterations", "4")[0] == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["ttur"], saved["renoise"], saved["gan_weight"], saved["iterations"]) == (2, [0.1, 0.9], 0, 4)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["generator_updates"] == 2


def test_evaluate_teacher_and_undistilled(capsys, tmp_path):
    for argv, nfe in (
        (["--teacher", "--steps", "3", "--reference", "teacher"], 6),
        (["--undistilled", "--guidance", "1"], 4),
    ):
        assert call(evaluate.main, capsys, *argv, "--num", "8", "--json", tmp_path / "new" / "m.json")[0] == 0
        assert json.loads((tmp_path / "new" / "m.json").read_text())["nfe"] == nfe


def test_evaluate_on_a_file_of_prompts(capsys, tmp_path):
    """Pictures are saved, and drawn again only where one is lost; scores are cosines by another route; the paper's rows stand beside ours."""
    prompts = [world.scene(i, "test")[1] for i in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    pictures, hps = tmp_path / "pictures", tmp_path / "hpsv2.json"
    hps.write_text(json.dumps({"HPSv2": [0.1, 0.2, 0.3, 0.4, 0.5]}))
    flags = [
        "--undistilled",
        "--prompts",
        tmp_path / "prompts.txt",
        "--images",
        pictures,
        "--pick",
        "toy/clip",
        "--scores",
        hps,
    ]
    status, _ = call(evaluate.main, capsys, *flags, "--json", tmp_path / "a.json")
    assert status == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["HPSv2"] == pytest.approx(0.3) and found["Pick"] == found["CLIP"] and found["num"] == 5

    model, tokenizer = CLIPModel.from_pretrained("toy/clip"), CLIPTokenizer.from_pretrained("toy/clip")
    images = torch.stack([data.pixels(Image.open(pictures / f"{i:05d}.png"), 64) for i in range(5)])
    out = model.float()(**tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=images)
    cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    assert found["CLIP"] == pytest.approx(cosines.mean().item(), abs=1e-4)

    before = {p.name: p.read_bytes() for p in pictures.glob("*.png")}
    (pictures / "00003.png").unlink()
    (pictures / "00001.png").write_bytes(before["00000.png"])  # not lost: left as it is
    assert call(evaluate.main, capsys, *flags)[0] == 0
    assert (pictures / "00003.png").read_bytes() == before["00003.png"] and (
        pictures / "00001.png"
    ).read_bytes() == before["00000.png"]
    for extra, words in [
        (["--seed", "1"], "another --images"),
        (["--scores", tmp_path / "prompts.txt"], "--scores"),
        (["--num", "4"], "5 scores of HPSv2 for 4 pictures"),
    ]:
        status, line = call(evaluate.main, capsys, *flags, *extra)
        assert status == 2 and words in line
    table = benchmark.table("ours", 4, {"CLIP": 0.5}).splitlines()
    assert table[-1] == "| **ours** | 4 |  | 0.5000 |  |  |  |  |" and any(
        line.startswith("| DMD2-SDXL | 4 | 0.8748 | 0.3302 |") for line in table
    )


def test_missing_runs_and_prompts(capsys, tmp_path):
    assert call(sample.main, capsys, "--run", tmp_path)[0] == 2
    assert call(evaluate.main, capsys, "--run", tmp_path / "none")[0] == 2
    assert call(evaluate.main, capsys, "--teacher", "--model", "toy/none")[0] == 2


def test_long_prompt_is_cut_off_with_a_warning(capsys):
    encoder = PromptEncoder("toy/sdxl", 64)
    encoder.encode(["a red circle"])
    assert "cut off" not in capsys.readouterr().err
    encoder.encode(["a red circle", "a red circle " * 30])
    assert "cut off after 32 tokens" in capsys.readouterr().err


def test_folder_of_pictures_trains(photos, capsys, tmp_path):
    (photos / "3.png").rename(photos / "3.jpeg")
    rows = (photos / "metadata.jsonl").read_text().replace("3.png", "3.jpeg")
    (photos / "metadata.jsonl").write_text(rows)
    status, _ = call(train.main, capsys, *SMALL, "--data", photos, "--out", tmp_path / "run", "--workers", "1")
    assert status == 0
    source = data.source(photos, 64)
    epoch = {source[i][1] for i in range(10)}
    assert len(epoch) == 10 and [source[i][1] for i in range(10)] != [source[i][1] for i in range(10, 20)]
    image = source[0][0]
    assert image.shape == (3, 64, 64) and -1 <= image.min() < image.max() <= 1


def test_photographs_train_preview_and_resume(capsys, tmp_path):
    """20 captioned views of a photograph that matplotlib ships: trained on, previewed, and resumed to the weights of an unbroken run."""
    views = tmp_path / "views"
    views.mkdir()
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")  # 512 x 600
    for i in range(20):
        left, top = 60 * (i % 5), 80 * (i // 5)
        photograph.crop((left, top, left + 200, top + 240)).save(views / f"{i}.jpg")
    rows = [{"file_name": f"{i}.jpg", "text": f"a photograph of an admiral, view {i}"} for i in range(20)]
    (views / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--data",
        views,
        "--batch-size",
        "4",
        "--preview-every",
        "4",
        "--save-every",
        "2",
        "--log-every",
        "1",
        "--lr-schedule",
        "constant",
    ]
    for name, *more in (
        ("whole", "--iterations", 4),
        ("halves", "--iterations", 2),
        ("halves", "--iterations", 4, "--resume"),
    ):
        assert call(train.main, capsys, *flags, "--out", tmp_path / name, *more)[0] == 0
    whole, halves = (
        load_file(run_folder.newest(tmp_path / name) / "unet/diffusion_pytorch_model.safetensors")
        for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    grid = Image.open(tmp_path / "halves" / "preview-000004.png")
    assert grid.width > 8 * 128 and len(set(grid.resize((64, 64)).getdata())) > 100


@pytest.mark.parametrize(
    "gan", [("--gan", "latent"), ("--gan-reals", "vae"), ("--gan", "online", "--candidates", "2")], ids=lambda g: g[1]
)
def test_training_on_cached_latents_is_training_on_pictures(gan, photos, capsys, tmp_path):
    """The losses of two loops, to the precision of fp16 latents; what was kept of other pictures costs no run that is there already."""
    losses, out = [], tmp_path / "run"
    for more in ((), ("--cache-latents", tmp_path / "kept", "--workers", "1")):
        assert call(train.main, capsys, *SMALL, "--data", photos, "--out", out, "--overwrite", *gan, *more)[0] == 0
        losses.append([json.loads(line)["d_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert (
        losses[0] == pytest.approx(losses[1], rel=1e-3) and len(list((tmp_path / "kept").glob("*.safetensors"))) == 10
    )
    status, line = call(train.main, capsys, *SMALL, "--data", tmp_path, "--out", out, "--overwrite", *gan, *more)
    assert status == 2 and (out / "metrics.jsonl").exists()


def test_original_sizes_reach_every_network(photos, capsys, tmp_path, monkeypatch):
    """Pictures 96 wide and 80 high, resized to 77 x 64, 6 cut off at the left; under guidance the null prompt's half is told the same."""
    seen, forward = [], UNet2DConditionModel.forward
    told = lambda net, *args, **kwargs: (
        seen.append(kwargs["added_cond_kwargs"]["time_ids"]) or forward(net, *args, **kwargs)
    )  # noqa: E731
    monkeypatch.setattr(UNet2DConditionModel, "forward", told)
    for condition in ("original", "square"):
        flags = [
            *SMALL,
            "--data",
            photos,
            "--out",
            tmp_path / condition,
            "--gan-weight",
            "0",
            "--size-condition",
            condition,
        ]
        assert call(train.main, capsys, *flags)[0] == 0
        sizes, seen[:] = torch.cat(seen).unique(dim=0).tolist(), []
        assert sizes == ([[80, 96, 0, 6, 64, 64]] if condition == "original" else [[64, 64, 0, 0, 64, 64]])


def test_unreadable_picture_is_skipped_counted_and_named(photos, capsys):
    table = photos / "metadata.jsonl"
    table.write_text("".join(table.read_text() for _ in range(3)))  # 30 rows: one bad name is less than 5 %
    (photos / "4.png").write_bytes((photos / "4.png").read_bytes()[:200])
    source = data.source(photos, 64)
    assert all(source[i] for i in range(30)) and list(source.bad) == ["4.png"]
    assert "4.png (1 so far)" in capsys.readouterr().out
    (photos / "5.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="more than 5 %"):
        [source[i] for i in range(30)]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "names no image"),
        ('{"file_name": "0.png"}\n', "line 1"),
        ('{"file_name": "0.png", "text": " "}\n', "empty"),
        ("{oops\n", "line 1"),
    ],
)
def test_bad_metadata(text, words, photos, capsys, tmp_path):
    (photos / "metadata.jsonl").write_text(text)
    status, line = call(train.main, capsys, *SMALL, "--data", photos, "--out", tmp_path / "run")
    assert status == 2 and words in line and not (tmp_path / "run").exists()


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = capsys.readouterr().out
    for name in vars(config.Config()):
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    "row, words",
    [
        ({"label_0": 3}, "line 2: label_0 is 3"),
        ({"jpg_1_file_name": "gone.png"}, "line 2: no image gone.png"),
        ({"caption": None}, "line 2: needs caption"),
    ],
)
def test_pairs_that_cannot_be_trained_on(row, words, tmp_path, capsys):
    good = {"caption": "a ring", "jpg_0_file_name": "a.png", "jpg_1_file_name": "a.png", "label_0": 1}
    pictures.to_pil(torch.zeros(3, 64, 64)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | row) + "\n")
    status, line = call(train.main, capsys, "--stage", "reward", "--pairs", tmp_path, "--out", tmp_path / "run", *SMALL)
    assert status == 2 and words in line and not (tmp_path / "run").exists()
    status, line = call(train.main, capsys, "--stage", "reward", "--out", tmp_path / "run")
    assert status == 2 and "--pairs" in line
