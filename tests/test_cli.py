"""Mistakes of a user: one clear line, exit status 2, nothing overwritten."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_qwen
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from transformers import CLIPModel, CLIPTokenizer

import evaluate
import export
import sample
import train
from engine import (
    base_model,
    checkpoint,
    config,
    data,
    decode,
    monitor,
    pictures,
    report,
    run_folder,
    safe_load,
)
from engine.batch import Batch
from engine.errors import UserError
from engine.flags import parse
from engine.models import load_denoiser, load_vae
from engine.networks import assemble
from engine.prompts import PromptEncoder, load_encoder
from toy import world

SMALL = ["--iterations", "1", "--batch-size", "2", "--preview-every", "0", "--log-every", "1"]
NO_GAN = ["--gan-weight", "0"]


def call(main, capsys, *argv):
    """Run a script's main(argv) -> its exit status and the last line that it printed; of a mistake, its one line."""
    try:
        main([str(a) for a in argv])
        status = 0
    except SystemExit as e:
        status = e.code
    text = capsys.readouterr()
    assert "Traceback" not in text.err
    if not status:
        return status, text.out.strip().splitlines()[-1]
    (line,) = (line for line in text.err.splitlines() if line.startswith("error: "))
    assert "usage:" not in text.err
    return status, line


@pytest.fixture(scope="module")
def run(small_toys, tmp_path_factory):
    """A run of one loop of a small model, without a GAN. Not to be changed."""
    argv = [*SMALL, *NO_GAN, "--model", small_toys["sdxl"], "--out", str(tmp_path_factory.mktemp("runs") / "run")]
    return train.train(train.read(argv))


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
        (["--cache-text", "kept"], "the toy world"),
        (["--cache-text", "kept", "--stage", "reward", "--pairs", "p"], "--stage reward"),
        (["--cache-text", "README.md", "--prompts", "README.md"], "README.md (it is a file)"),
        (["--cache-text", "docs", "--prompts", "README.md"], "docs holds something else: give another --cache-text"),
        (["--cache-latents", "kept", "--data", "a.tar"], "--gan-reals vae"),
        (["--cache-latents", "kept", "--method", "dmd2"], "the toy world"),
        (["--cache-latents", "README.md", "--method", "dmd2", "--ttur", "1", "--data", "a.tar"], "is a file"),
        (["--size-condition", "original"], "their own captions"),
        (["--judge", "runs/none"], "--judge"),
        (
            ["--judge", "runs/none", "--method", "advdmd", "--ttur", "1", "--batch-size", "4"],
            "runs/none holds no stage-1 checkpoint",
        ),
        (["--gan", "latent"], "--gan"),
        (["--method", "dmd3"], "dmd3"),
        (["--prompts", "toy/nothing.txt"], "toy/nothing.txt"),
        (
            ["--method", "dmd2", "--ttur", "1", "--prompts", "README.md"],
            "--prompts and --method dmd2 exclude each other",
        ),
        (
            ["--method", "advdmd", "--ttur", "1", "--batch-size", "4", "--prompts", "README.md"],
            "--prompts and --method advdmd exclude",
        ),
        (["--ema", "2"], "--ema"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "0"], "--lr"),
        (["--sam", "somebody/sam-huge"], "somebody/sam-huge"),
        (["--resolution", "66", "--data", "toy"], "--resolution 66 must be a multiple of 16"),
        (["--iterations", "0"], "--iterations"),
        (["--student-steps", "0"], "--student-steps must lie in 1 to 1000"),
        (["--student-steps", "1001"], "--student-steps must lie in 1 to 1000"),
        (["--student-steps", "2.5"], "--student-steps"),
        (
            ["--method", "advdmd", "--ttur", "1", "--batch-size", "4", "--student-steps", "1"],
            "--method advdmd needs --student-steps of at least 2",
        ),
        (["--pair-threshold", "0.5,"], "a number, or one for each student step, such as 0.6,0.573, not 0.5,"),
        (["--pair-threshold", "0.5,1"], "--pair-threshold must lie in [0, 1)"),
        (["--pair-threshold", "0.5,nan"], "--pair-threshold must be a finite number"),
        (["--warmup", "-1"], "--warmup must not be negative"),
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
@pytest.mark.parametrize(
    "argv", [["--seed", "-1"], ["--steps", "0"], ["--steps", "1001"], ["--num", "0"], ["--num", "many"]]
)
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
    """Neither a checkpoint's table of contents, of all ranks or of one, nor what else torch pickles there."""
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


def full(*args, **kwargs):
    """What takes more memory than the machine has."""
    return torch.empty(2**50)


def test_out_of_memory_is_named():
    """An allocation that the machine refuses: in which network or optimizer, where, at how many samples, what helps."""
    settings = train.read(["--batch-size", "2"])
    nets = assemble(settings, 1, torch.device("cpu"), train.prepare)
    prompts = ["a red circle", "a blue ring"]
    batch = Batch(torch.zeros(2, 3, 64, 64), prompts, nets.encoder.encode(prompts), [0, 1], loop=1)
    parts = {
        "the score estimator": (nets.fake.net, "forward"),
        "the teacher": (nets.teacher.net, "forward"),
        "the VAE": (nets.vae.net, "decode"),
        "the optimizer step of D": (nets.players["D"][1], "step"),
    }
    for name, (owner, method) in parts.items():
        works = getattr(owner, method)
        setattr(owner, method, full)
        with pytest.raises(RuntimeError) as error:
            train.flash(nets, batch, 1)
        setattr(owner, method, works)
        line = monitor.error_line(error.value, settings)
        assert line.startswith(f"out of memory in {name}, train.py line "), line
        for words in ("with 2 samples", "--micro-batch", "--checkpointing", "--gan-crop 32"):
            assert words in line


def test_out_of_memory_ends_a_run_with_one_line(capsys, tmp_path, monkeypatch):
    def without_memory(*args, real=assemble):
        nets = real(*args)
        nets.G.net.forward = full
        return nets

    monkeypatch.setattr(train, "assemble", without_memory)
    status, line = call(train.main, capsys, *SMALL, *NO_GAN, "--out", tmp_path / "run")
    assert status == 2 and "out of memory in the generator G, train.py line" in line and "--gan-crop" not in line


def test_a_run_folder_that_goes_away_ends_the_run_with_one_line(capsys, tmp_path, monkeypatch):
    def then_gone(*args, real=assemble):
        nets = real(*args)
        shutil.rmtree(tmp_path / "run")
        return nets

    monkeypatch.setattr(train, "assemble", then_gone)
    status, line = call(train.main, capsys, *SMALL, *NO_GAN, "--out", tmp_path / "run")
    assert status == 2 and "run was deleted or moved while it was trained" in line


def test_batch_not_divisible_by_ranks(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, line = call(train.main, capsys, *SMALL, "--out", tmp_path / "run")
    assert status == 2 and "--batch-size 2 is not divisible by 3 ranks" in line


def test_8_bit_moments_want_the_same_ranks(tmp_path):
    config_ = config.Config(optimizer="adamw8bit", t5="off", resume=True, out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(vars(config_)))
    (tmp_path / "checkpoint-000002").mkdir()
    for ranks, refused in ((1, False), (2, True)):
        (tmp_path / "checkpoint-000002" / "progress.json").write_text(json.dumps({"loops": 2, "ranks": ranks}))
        line = run_folder.refusal(config_, tmp_path)
        assert bool(line) == refused
    assert "2 ranks, not 1" in line


def test_restart_by_torchrun_goes_on_with_its_own_run(capsys, monkeypatch, tmp_path):
    """--max-restarts asks for --out; what this torchrun began goes on without --resume, another's run is refused."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    status, line = call(train.main, capsys, *SMALL)
    assert status == 2 and "--max-restarts needs --out" in line
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert not parse(out).resume
    config_ = parse([*out, "--lr", "1e-3"])
    run_folder.write_config(run_folder.open_run(config_), config_)
    assert not parse(out).resume  # a second command under the same --rdzv-id, as in a Slurm job of two
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = parse(out)
    assert again.resume and again.lr == 1e-3 and run_folder.refusal(again, tmp_path / "run") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert "is not empty" in run_folder.refusal(parse(out), tmp_path / "run")


def test_run_folder_is_never_overwritten_unasked(run, small_toys, capsys, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, line = call(train.main, capsys, *SMALL, "--out", run)
    assert status == 2 and "--resume" in line and "--overwrite" in line
    mine = tmp_path / "file.txt"
    mine.write_text("mine")
    for keep in (tmp_path, mine):  # not run folders: --overwrite must not delete them
        assert call(train.main, capsys, *SMALL, "--out", keep, "--overwrite")[0] == 2 and mine.exists()
    model = shutil.copytree("toy/sdxl", tmp_path / "other")
    status, line = call(train.main, capsys, *SMALL, "--out", run, "--resume", "--model", model)
    assert status == 2 and f"--model {small_toys['sdxl']}" in line
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_sample_and_evaluate_a_run(run, capsys, tmp_path):
    status, line = call(sample.main, capsys, "--run", run, "--prompt", " ")
    assert status == 2 and "empty" in line
    out = tmp_path / "pictures"
    status, line = call(sample.main, capsys, "--run", run, "--prompt", "a red circle " * 30, "--out", out)
    assert status == 0 and (out / "00000.png").exists() and "seconds per image" in line
    status, line = call(sample.main, capsys, "--run", run, "--out", out)
    assert status == 2 and "holds something" in line
    status, _ = call(evaluate.main, capsys, "--run", run, "--num", "16", "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    keys = "prompt_accuracy attribute_accuracy frechet precision recall clip_score reward saturation contrast nfe "
    keys += "seconds_per_image num seed real"
    assert status == 0 and sorted(found) == sorted(keys.split()) and found["nfe"] == 4 and found["num"] == 16


def test_a_stopped_sample_goes_on_to_the_same_pictures(run, capsys, tmp_path):
    """SIGTERM after two pictures of 12: they stay, whole, one line; --resume draws what an unbroken call does."""
    names = tmp_path / "prompts.txt"
    names.write_text("".join(f"a red circle, number {i}\n" for i in range(12)))
    flags = ["--run", str(run), "--prompts", str(names), "--batch-size", "2", "--seed", "3"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "sample.py", *flags, "--out", str(out)]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "00001.png").exists() and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=60)[1]
    there = sorted(out.glob("*.png"))
    assert stopped.returncode == 143 and 2 <= len(there) < 12 and "Traceback" not in said
    assert f"{len(there)} of 12 pictures" in said.splitlines()[-1] and f"--resume --out {out}" in said.splitlines()[-1]
    for argv in ([*flags], [*flags, "--resume", "--seed", "4"], ["--resume", "--size", "96"]):
        status, line = call(sample.main, capsys, *argv, "--out", out)
        assert status == 2 and "another --out" in line and sorted(out.glob("*.png")) == there
    assert call(sample.main, capsys, "--resume", "--out", out)[0] == 0
    assert call(sample.main, capsys, *flags, "--out", whole)[0] == 0
    for picture in (*whole.glob("*.png"), whole / "prompts.txt"):
        assert (out / picture.name).read_bytes() == picture.read_bytes()
    assert len(list(out.glob("*.png"))) == 13  # and grid.png


@pytest.mark.parametrize("model, step, most", [("toy/sdxl", 16, None), ("toy/sd3", 8, 64)])
def test_sizes(model, step, most, capsys, tmp_path, monkeypatch):
    """Pictures that are not square, and what SDXL is told of them; other sizes are refused before torch is loaded."""
    seen, forward = [], UNet2DConditionModel.forward

    def told(net, *args, **kwargs):
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])
        return forward(net, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", told)
    encoder, vae, G = load_encoder(model, 64), load_vae(model), load_denoiser(model)
    size = (step, 2 * step)
    base_model.check_size(model, size)
    pictures.draw(tmp_path, G, encoder, vae, ["a red circle"] * 3, 1, 0, batch=2, size=size)
    assert [Image.open(path).size for path in tmp_path.iterdir()] == [size[::-1]] * 3
    assert {tuple(row) for rows in seen for row in rows.tolist()} <= {(*size, 0, 0, *size)}
    assert bool(seen) == (model == "toy/sdxl")
    with pytest.raises(UserError, match=f"multiples of {step} pixels, such as {2 * step}x{step}"):
        base_model.check_size(model, (2 * step + 1, 1))
    if most:
        with pytest.raises(UserError, match=f"at most {most} pixels"):
            base_model.check_size(model, (most, 2 * most))


def test_without_a_run_the_shipped_student_draws(run, capsys, tmp_path, monkeypatch):
    """An fp16 UNet and its settings, in bf16 and to a rounding in fp32; a trained run goes first unless it is named."""
    shipped = tmp_path / "student"
    net = UNet2DConditionModel.from_pretrained(run_folder.newest(run) / "unet")
    net.half().save_pretrained(shipped / "unet")
    shutil.copy(run / "config.json", shipped)
    monkeypatch.chdir(tmp_path)
    prompt = ["--prompt", "a red circle"]
    monkeypatch.setattr(run_folder, "SHIPPED", tmp_path / "none")
    assert "no run with a checkpoint" in call(sample.main, capsys, *prompt)[1]
    monkeypatch.setattr(run_folder, "SHIPPED", shipped)
    for dtype, out in (("bf16", "half"), ("fp32", "shipped")):
        sample.main([*prompt, "--out", out, "--dtype", dtype])
        assert f"drawing with the student that comes along, {shipped}" in capsys.readouterr().out
    assert call(sample.main, capsys, "--resume", "--out", "shipped")[0] == 0
    scores = []
    for dtype in ("fp32", "bf16"):
        assert call(evaluate.main, capsys, "--num", "8", "--dtype", dtype, "--json", "m.json")[0] == 0
        scores.append(json.loads(Path("m.json").read_text())["clip_score"])
    assert scores[0] != scores[1] == pytest.approx(scores[0], abs=0.02)
    shutil.copytree(run, "runs/mine")
    status, line = call(sample.main, capsys, *prompt, "--out", "trained")
    half, fp16, trained = (pictures.read_picture(Path(out, "00000.png")) for out in ("half", "shipped", "trained"))
    assert status == 0 and 0 < (fp16 - trained).abs().max() < 0.1 and 0 < (half - trained).abs().mean() < 0.1
    assert call(sample.main, capsys, *prompt, "--run", "student", "--out", "named")[0] == 0
    assert torch.equal(pictures.read_picture(Path("named/00000.png")), fp16)
    assert {path.name for path in shipped.iterdir()} == {"unet", "config.json"}


def test_a_run_folder_has_one_process(run, capsys, tmp_path):
    """Another process holds the lock: refused, nothing changed. It is killed: nothing stands in the way."""
    out = shutil.copytree(run, tmp_path / "run")
    hold = f"from engine.locks import lock; lock({str(out / 'lock')!r}); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    for resume in ("--resume", "--overwrite"):
        status, line = call(train.main, capsys, *SMALL, *NO_GAN, "--out", out, resume)
        assert status == 2 and f"{out} is in use" in line and run_folder.newest(out)
    settings = train.read([*SMALL, *NO_GAN, "--out", str(out), "--resume"])
    with pytest.raises(UserError, match="in use"):
        run_folder.open_run(settings)
    other.kill()
    other.wait()
    run_folder.close_run(run_folder.open_run(settings))


def test_fewer_loops_than_done(run, capsys):
    """--iterations below what a resumed run has done: said, and its settings stay."""
    before = (run / "config.json").read_bytes()
    newest = run_folder.newest(run) / "progress.json"
    saved = newest.read_text()
    newest.write_text(json.dumps(json.loads(saved) | {"loops": 9}))
    status, line = call(train.main, capsys, "--resume", "--out", run, "--iterations", "5")
    newest.write_text(saved)
    assert status == 2 and "has done 9 loops already" in line and (run / "config.json").read_bytes() == before


def test_full_disk(run, capsys, tmp_path):
    """Files that cannot grow beyond 1 MB: one line, the last checkpoint whole, no torn one, and the run goes on."""
    out = shutil.copytree(run, tmp_path / "run")
    resumed = ["--resume", "--out", out, "--iterations", "2"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    status, line = call(train.main, capsys, *resumed)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "cannot save checkpoint-000002" in line and "checkpoint-000001 is whole" in line
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-000001"]
    assert call(train.main, capsys, *resumed)[0] == 0 and run_folder.newest(out).name == "checkpoint-000002"


def test_bare_commands_take_the_newest_run(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        shutil.copytree(run, f"runs/{name}")
        newest = run_folder.newest(f"runs/{name}") / "progress.json"
        os.utime(newest, (1e9 - age, 1e9 - age))
    for name, saved in (("reward", '{"stage": "reward"}'), ("torn", '{"stage": 1, ')):  # newer, and no students
        shutil.copytree("runs/old", f"runs/{name}")
        Path(f"runs/{name}/config.json").write_text(saved)
        (run_folder.newest(f"runs/{name}") / "progress.json").touch()
    status, line = call(sample.main, capsys, "--steps", "4")
    assert status == 0 and "runs/new/samples" in line
    for main, argv in ((sample.main, ["--run", "runs/torn"]), (train.main, ["--resume", "--out", "runs/torn"])):
        status, line = call(main, capsys, *argv)
        assert status == 2 and "config.json" in line and "torn" in line


def test_a_run_that_cannot_start_replaces_none(run, small_toys, capsys, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    stage_2 = ["--stage", "2", *NO_GAN, "--model", small_toys["sdxl"], "--init", run, "--out", out, "--overwrite"]
    status, line = call(train.main, capsys, *stage_2, "--clip", "toy/nothing")
    assert status == 2 and "toy/nothing" in line and (out / "metrics.jsonl").exists()


def test_resume_keeps_the_runs_settings(capsys, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, *NO_GAN, "--iterations", "2", "--ttur", "2", "--renoise", "0.1,0.9"]
    assert call(train.main, capsys, *flags, "--out", out)[0] == 0
    assert call(train.main, capsys, "--resume", "--out", out, "--iterations", "3")[0] == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["ttur"], saved["renoise"], saved["gan_weight"], saved["iterations"]) == (2, [0.1, 0.9], 0, 3)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["generator_updates"] == 1


def test_a_run_of_before_method_goes_on_as_it_was(capsys, tmp_path):
    """A DMD2 run whose config.json says gan = latent: its head learns on, and all scripts read it."""
    out = tmp_path / "run"
    assert call(train.main, capsys, *SMALL, "--method", "dmd2", "--ttur", "1", "--out", out)[0] == 0
    saved = json.loads((out / "config.json").read_text())
    assert saved.pop("method") == "dmd2"
    (out / "config.json").write_text(json.dumps(saved | {"gan": "latent"}))
    before = saved_state(out)["head"]["model"]
    assert call(train.main, capsys, "--resume", "--out", out, "--iterations", "2")[0] == 0
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loops"] == 2 and "d_loss" in logged[-1]
    after = saved_state(out)["head"]["model"]
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert json.loads((out / "config.json").read_text())["method"] == "dmd2"
    assert call(sample.main, capsys, "--run", out, "--prompt", "a red circle")[0] == 0
    assert call(export.main, capsys, out, tmp_path / "student")[0] == 0
    assert '"method": "dmd2"' in (tmp_path / "student" / "README.md").read_text()


def saved_state(out):
    """The weights and optimizers in a run's newest checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run_folder.newest(out) / "state", out / "state.pt")
    return torch.load(out / "state.pt", weights_only=True)


def test_evaluate_teacher_and_undistilled(capsys, tmp_path):
    for argv, nfe in (
        (["--teacher", "--steps", "3", "--reference", "teacher"], 6),
        (["--undistilled", "--guidance", "1"], 4),
    ):
        assert call(evaluate.main, capsys, *argv, "--num", "8", "--json", tmp_path / "new" / "m.json")[0] == 0
        assert json.loads((tmp_path / "new" / "m.json").read_text())["nfe"] == nfe


def test_evaluate_on_a_file_of_prompts(capsys, tmp_path):
    """Pictures are saved, and drawn again where one is lost; scores are cosines by another route."""
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
    images = torch.stack([decode.pixels(Image.open(pictures / f"{i:05d}.png"), 64) for i in range(5)])
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
        (["--dtype", "bf16"], "another --images"),
        (["--scores", tmp_path / "prompts.txt"], "--scores"),
        (["--num", "4"], "another --images"),
        (["--num", "4", "--images", tmp_path / "four"], "5 scores of HPSv2 for 4 pictures"),
    ]:
        status, line = call(evaluate.main, capsys, *flags, *extra)
        assert status == 2 and words in line
    result = {"name": "ours", "nfe": 4, "CLIP": 0.5}
    table = report.markdown(report.table([result])).splitlines()
    assert table[-1] == "| **ours** | 4 |  | 0.5000 |  |  |  |" and any(
        line.startswith("| DMD2-SDXL | 4 | 0.8748 | 0.3302 |") for line in table
    )


def test_missing_runs_and_prompts(capsys, tmp_path):
    for main, argv in ((sample.main, ["--run"]), (evaluate.main, ["--run"]), (export.main, [])):
        out = [tmp_path / "out"] if main is export.main else []
        status, line = call(main, capsys, *argv, tmp_path / "none", *out)
        assert status == 2 and f"{tmp_path / 'none'} holds no checkpoint" in line
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
    flags = [*SMALL, *NO_GAN, "--data", photos, "--workers", "1"]
    status, _ = call(train.main, capsys, *flags, "--out", tmp_path / "run")
    assert status == 0
    source = data.source(photos, 64)
    epoch = {source[i][1] for i in range(10)}
    assert len(epoch) == 10 and [source[i][1] for i in range(10)] != [source[i][1] for i in range(10, 20)]
    image = source[0][0]
    assert image.shape == (3, 64, 64) and -1 <= image.min() < image.max() <= 1


def test_photographs_train_preview_and_resume(capsys, tmp_path, small_toys):
    """20 captioned views of matplotlib's photograph: trained on, previewed; a run in two parts ends alike."""
    views = tmp_path / "views"
    views.mkdir()
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")  # 512 x 600
    for i in range(20):
        left, top = 60 * (i % 5), 80 * (i // 5)
        photograph.crop((left, top, left + 200, top + 240)).save(views / f"{i}.jpg")
    rows = [{"file_name": f"{i}.jpg", "text": f"a photograph of an admiral, view {i}"} for i in range(20)]
    (views / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALL, "--model", small_toys["sdxl"], "--data", views, "--lr-schedule", "constant"]
    parts = {"whole": [["--iterations", 2]], "halves": [[], ["--iterations", 2, "--resume", "--preview-every", 2]]}
    for name, commands in parts.items():
        for more in commands:
            assert call(train.main, capsys, *flags, "--out", tmp_path / name, *more)[0] == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    whole, halves = (load_file(run_folder.newest(tmp_path / name) / weights) for name in parts)
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    grid = Image.open(tmp_path / "halves" / "preview-000002.png")
    assert grid.width > 8 * 128 and len(set(grid.resize((64, 64)).getdata())) > 100


@pytest.mark.parametrize(
    "method",
    [
        ("--method", "dmd2", "--ttur", "1"),
        ("--gan-reals", "vae"),
        ("--method", "advdmd", "--ttur", "1", "--candidates", "2"),
    ],
    ids=lambda flags: flags[1],
)
def test_training_on_cached_latents_is_training_on_pictures(method, photos, capsys, tmp_path):
    """The losses of a loop, to the precision of fp16 latents. A cache of other pictures costs no run that is there."""
    losses, out, kept = [], tmp_path / "run", tmp_path / "kept"
    for more in ((), ("--cache-latents", kept, "--workers", "1")):
        assert call(train.main, capsys, *SMALL, "--data", photos, "--out", out, "--overwrite", *method, *more)[0] == 0
        losses.append([json.loads(line)["d_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 1 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(list(kept.glob("*.safetensors"))) == 10
    other = shutil.copytree(photos, tmp_path / "other")
    status, line = call(train.main, capsys, *SMALL, "--data", other, "--out", out, "--overwrite", *method, *more)
    assert status == 2 and f"{kept} holds latents of" in line and (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("condition, sizes", [("original", [80, 96, 0, 6, 64, 64]), ("square", [64, 64, 0, 0, 64, 64])])
def test_original_sizes_reach_every_network(condition, sizes, photos, capsys, tmp_path, monkeypatch):
    """Pictures 96 wide and 80 high, resized to 77 x 64, 6 cut off at the left: G, score estimator and teacher are told.

    Under guidance the null prompt's half is told the same.
    """
    seen, forward = {}, UNet2DConditionModel.forward

    def told(net, *args, **kwargs):
        seen.setdefault(net, []).append(kwargs["added_cond_kwargs"]["time_ids"])
        return forward(net, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", told)
    flags = [*SMALL, *NO_GAN, "--data", photos, "--out", tmp_path / "run", "--size-condition", condition]
    assert call(train.main, capsys, *flags)[0] == 0
    assert [torch.cat(found).unique(dim=0).tolist() for found in seen.values()] == [[sizes]] * 3


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


@pytest.mark.parametrize(
    "row, words",
    [
        ({"label_0": 3}, "line 2: label_0 is 3"),
        ({"jpg_1_file_name": "gone.png"}, "gone.png (no such file)"),
        ({"jpg_1_file_name": 5}, "line 2: needs caption, jpg_0_file_name"),
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


# ------------------------------------------------------------- answers within a second: nothing loads torch


@pytest.mark.parametrize(
    "command",
    [
        "train.py --help",
        "sample.py --help",
        "evaluate.py --help",
        "export.py --help",
        "doctor.py --help",
    ],
)
def test_help_without_torch(command):
    status, out, err = without_torch(command)
    assert status == 0 and err == [] and out[0].startswith("usage: ")


@pytest.mark.parametrize(
    "command, words",
    [
        ("train.py --nonsense", "--nonsense"),
        ("train.py --stage 3", "--stage"),
        ("train.py --lr 0", "--lr must be positive"),
        ("train.py --data DIR/nowhere", "metadata.jsonl"),
        ("train.py --data DIR", "It holds 3 .json, 1 .txt"),
        ("train.py --data DIR/*.tar", "matches no file"),
        ("train.py --prompts DIR/nowhere", "no such file"),
        ("train.py --stage reward --pairs DIR", "jpg_0_file_name"),
        ("train.py --model DIR/nowhere", "no such folder: DIR/nowhere"),
        ("train.py --model nowhere/sd_xl.safetensors", "no such folder: nowhere/sd_xl.safetensors"),
        ("train.py --model DIR/file.txt", "DIR/file.txt is no pipeline folder (it lacks model_index.json)"),
        ("train.py --model DIR/flux", "DIR/flux is a FluxPipeline"),
        ("train.py --sam DIR/nowhere", "no such folder: DIR/nowhere"),
        ("train.py --out DIR", "DIR is not empty"),
        ("train.py --out DIR --resume", "nothing to resume in DIR"),
        ("train.py --stage 2 --init DIR/nowhere", "DIR/nowhere holds no stage-1 checkpoint"),
        ("train.py --out DIR/file.txt/run", "cannot write to DIR/file.txt/run"),
        ("train.py --ttur 5 --iterations 4", "--ttur 5 is above --iterations 4"),
        ("train.py --stage 2 --student-steps 1", "--stage 2 needs --student-steps of at least 2"),
        ("sample.py --steps 0", "--steps"),
        ("sample.py --size 64x", "--size"),
        ("sample.py --device tpu", "--device"),
        ("sample.py --resume", "--out"),
        ("sample.py --out DIR", "DIR holds something already"),
        ("sample.py --out DIR/file.txt/new", "cannot write to DIR/file.txt/new"),
        ("evaluate.py --teacher --prompts DIR/file.txt --images DIR", "another --images"),
        ("evaluate.py --teacher --prompts DIR/file.txt --images DIR/file.txt", "cannot write to DIR/file.txt"),
        ("evaluate.py --teacher --json DIR/file.txt/m.json", "another --json"),
        ("evaluate.py --teacher --json DIR", "is a folder"),
        ("sample.py --run DIR/nowhere", "DIR/nowhere holds no checkpoint"),
        ("sample.py --run DIR/run --model DIR/flux", "DIR/flux is a FluxPipeline"),
        ("sample.py --run DIR/run --prompts DIR/nowhere", "no such file"),
        ("evaluate.py --nonsense", "--nonsense"),
        ("evaluate.py --guidance nan", "--guidance: must be a finite number, not nan"),
        ("evaluate.py --guidance inf", "--guidance: must be a finite number, not inf"),
        ("evaluate.py --teacher --model DIR/flux", "DIR/flux is a FluxPipeline"),
        ("evaluate.py --run DIR/run", "DIR/flux is a FluxPipeline"),
        ("evaluate.py --run DIR/nowhere", "DIR/nowhere holds no checkpoint"),
        ("evaluate.py --prompts DIR/prompts.txt", "--images"),
        ("export.py DIR/nowhere", "out"),
        ("export.py DIR/nowhere DIR/out", "DIR/nowhere holds no checkpoint"),
        ("doctor.py", "run"),
        ("doctor.py DIR/nowhere", "DIR/nowhere is not there"),
        ("doctor.py DIR/file.txt", "DIR/file.txt is a file"),
        ("doctor.py DIR/run", "DIR/run is not a run folder: it has no metrics.jsonl"),
    ],
)
def test_mistakes_without_torch(command, words, tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    made = tmp_path / "run" / "checkpoint-000001"
    made.mkdir(parents=True)
    (made / "progress.json").write_text("{}")
    (made.parent / "config.json").write_text(json.dumps(vars(config.Config(model=str(tmp_path / "flux")))))
    status, out, err = without_torch(command.replace("DIR", str(tmp_path)))
    assert status == 2 and out == [] and len(err) == 1
    assert err[0].startswith("error: ") and words.replace("DIR", str(tmp_path)) in err[0]


def without_torch(command):
    """Run a script -> its status and the lines of its two outputs. It must not import torch."""
    program = [sys.executable, "-X", "importtime", *command.split()]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert "argparse" in imported and "torch" not in imported
    return done.returncode, done.stdout.splitlines(), [line for line in lines if not line.startswith("import time:")]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--resolution 72 --data PHOTOS", "--resolution 72 must be a multiple of 16"),
        ("--gan-crop 30", "--gan-crop 30 must be a multiple of 4"),
        ("--model toy/sd3 --size-condition original --data PHOTOS", "toy/sd3 has no size conditions"),
        ("--sam PHOTOS/sam_vit_b.pth", "no SAM checkpoint at"),
        ("--text-length 100", "--text-length 100 is T5's"),
        ("--model PHOTOS/sdxl-turbo", "sdxl-turbo is distilled, and no teacher: name its base model with --teacher"),
        ("--teacher PHOTOS/sdxl-turbo", "sdxl-turbo is distilled"),
        ("--quantize-frozen int8 --lora-rank 4", "needs the package torchao"),
    ],
)
def test_what_no_network_of_the_family_can_have_is_refused_before_any_is_loaded(photos, monkeypatch, flags, said):
    (photos / "sdxl-turbo").symlink_to(Path("toy/sdxl").resolve())
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(said)):
        run_folder.look(train.read(flags.replace("PHOTOS", str(photos)).split()))
    monkeypatch.undo()
    run_folder.look(train.read(["--model", str(photos / "sdxl-turbo"), "--teacher", "toy/sdxl"]))


def test_stage_2_without_a_reward_model_of_the_latents_is_refused_before_a_run_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="no latent reward model of its latents"):
        run_folder.look(train.read(["--stage", "2", "--model", str(tiny_qwen(tmp_path / "base"))]))
