"""doctor.py: each disease is found in the recorded curves of a run that has it, and none in healthy runs."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import doctor
import train
from engine import doctor as rules
from engine import run_log
from engine.config import Config
from lab import health

RECORDS = health.RECORDS


def run_of(folder, rows=(), **settings):
    """A run folder with these rows of metrics.jsonl -> what the rules read of it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"method": "flash", "iterations": 100} | settings))
    lines = [json.dumps({"loops": n} | row) for n, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run_log.read(folder)


def diseases(run):
    return [finding.disease for finding in rules.examine(run)]


@pytest.mark.parametrize("name", health.GALLERY)
def test_each_disease_is_found_and_none_in_healthy_runs(name):
    made = health.GALLERY[name].disease
    found = diseases(run_log.read(RECORDS / name))
    assert made in found if made else found == []


HEALTHY = [*health.REFERENCES, *(name for name, made in health.GALLERY.items() if not made.disease)]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_warning_at_any_time(name):
    """After every line of its log. The runs of eight and more samples pass by the limits for any model, too."""
    run = run_log.read(RECORDS / name)
    for bands in [run.bands] + [{}] * (run.config["batch_size"] >= 8):
        for n in range(1, len(run.rows) + 1):
            assert diseases(replace(run, rows=run.rows[:n], bands=bands)) == [], f"line {n}"


def test_the_gallery_has_every_disease():
    assert {made.disease for made in health.GALLERY.values()} == {"", *rules.DISEASES}


def test_bands_and_page_are_the_records():
    """`python -m lab.health --print` changes nothing; no run of the gallery has kind and seed of one of the bands."""
    assert health.bands() == json.loads(run_log.BANDS.read_text())
    assert health.page() == health.PAGE.read_text()
    settings = {name: run_log.read(RECORDS / name).config for name in (*health.REFERENCES, *health.GALLERY)}
    origin = {name: (run_log.kind(config), config["seed"]) for name, config in settings.items()}
    assert not {origin[name] for name in health.REFERENCES} & {origin[name] for name in health.GALLERY}


def test_bands_are_of_the_toys_runs_alone(tmp_path):
    rows = [{"dm_loss": 1.0}]
    assert run_of(tmp_path / "toy", rows).bands
    for other in ({"model": "stabilityai/sdxl"}, {"method": "dmd2"}, {"data": "pictures"}):
        assert not run_of(tmp_path / "other", rows, **other).bands


@pytest.mark.parametrize(
    "rewards, judged, found",
    [
        ([1.0, 1.2, 1.4], [0.7, 0.6, 0.5], True),
        ([1.0, 1.2, 1.4], [0.7, 0.8, 0.5], True),  # the judge is best at the second preview
        ([1.0, 1.2, 1.4], [0.7, 0.6, 0.57], False),  # within two standard errors of a difference, 0.14
        ([1.0, 1.02, 1.0], [0.7, 0.6, 0.5], False),  # the reward has not risen
        ([1.4, 1.2, 1.4], [0.8, 0.6, 0.5], False),
        ([1.0], [0.7], False),
    ],
)
def test_reward_hacking(rewards, judged, found, tmp_path):
    names = ("held_out_reward", "held_out_prompt_accuracy", "held_out_reward_error", "held_out_prompt_accuracy_error")
    looks = [dict(zip(names, (r, j, 0.02, 0.05))) for r, j in zip(rewards, judged)]
    seen = rules.examine(run_of(tmp_path / "run", looks, stage=2))
    assert [f.disease for f in seen] == ["reward hacking"] * found
    assert all("to 1.400" in f.seen and "to 0.500" in f.seen for f in seen)


def test_watched_prompts_that_become_alike(tmp_path):
    pair = {"watch_diversity_teacher": 0.1}
    assert diseases(run_of(tmp_path / "run", [pair | {"watch_diversity": 0.06}])) == []
    assert diseases(run_of(tmp_path / "run", [pair | {"watch_diversity": 0.04}])) == ["diversity falling"]


def test_a_preview_warns_in_one_line(small_toys, tmp_path, capfd):
    """A generator that does not move, at the second preview; the first cannot know."""
    small = {"model": small_toys["sdxl"], "batch_size": 1, "gan_weight": 0, "preview_every": 1, "log_every": 1}
    train.train(Config(**small, iterations=2, lr=1e-30, out=str(tmp_path / "run")))
    text = capfd.readouterr()
    lines = [line for line in re.split(r"[\r\n]", text.out + text.err) if line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: G never moved?") and "python doctor.py" in lines[0]
    (tmp_path / "run" / "config.json").write_text("[")
    assert rules.warning(tmp_path / "run") is None


BAD = {  # what is in the run folder -> words of the line
    "nothing there": (None, "is not there"),
    "no log": ({"config.json": "{}"}, "has no metrics.jsonl"),
    "no settings": ({"metrics.jsonl": '{"loops": 1}'}, "has no config.json"),
    "torn settings": ({"config.json": "{", "metrics.jsonl": '{"loops": 1}'}, "config.json is no run's (it is torn"),
    "a list": ({"config.json": "[]", "metrics.jsonl": '{"loops": 1}'}, "config.json is no run's"),
    "no number": ({"config.json": '{"iterations": "many"}', "metrics.jsonl": '{"loops": 1}'}, "iterations is 'many'"),
    "a reward model": ({"config.json": '{"stage": "reward"}', "metrics.jsonl": '{"loops": 1}'}, "--stage reward"),
    "empty log": ({"config.json": "{}", "metrics.jsonl": "\n"}, "is empty: nothing is logged before loop 10"),
    "torn line": ({"config.json": "{}", "metrics.jsonl": '{"lo\n{"loops": 2}'}, "metrics.jsonl line 1 is torn"),
    "no counter": ({"config.json": "{}", "metrics.jsonl": '{"a": 2}'}, "line 1 is not a line of a run's log"),
    "words": ({"config.json": "{}", "metrics.jsonl": '{"loops": "two"}'}, "line 1 is not a line of a run's log"),
}


@pytest.mark.parametrize("name", BAD)
def test_no_run_to_read(name, tmp_path, capsys):
    files, words = BAD[name]
    folder = tmp_path / "run"
    for file, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    with pytest.raises(SystemExit) as left:
        doctor.main([str(folder)])
    text = capsys.readouterr()
    assert left.value.code == 2 and text.out == "" and len(text.err.splitlines()) == 1
    assert words in text.err and str(folder) in text.err and not (folder / "doctor.png").exists()


def test_odd_logs_are_read(tmp_path):
    """A torn last line and preview, NaN, infinity, zeros and negative numbers: a run that went wrong or goes on."""
    (tmp_path / "run").mkdir()
    odd = [float("nan"), float("inf"), -float("inf"), 0, -1, True]
    names = "dm_loss score_lag d_loss d_accuracy saturation saturation_real diversity diversity_teacher g_norm".split()
    rows = [{k: odd[(n + i) % 6] for i, k in enumerate(names)} for n in range(1, 40)]
    rows = [json.dumps({"loops": n} | row) for n, row in enumerate(rows, 1)]
    (tmp_path / "run" / "config.json").write_text('{"method": "flash", "model": "toy/sdxl"}')
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*rows, '{"loops": 40, "dm_']))
    (tmp_path / "run" / "preview-000040.png").write_bytes(b"\x89PNG\r\n")
    assert doctor.main([str(tmp_path / "run")]) in (0, 1)
    assert (tmp_path / "run" / "doctor.png").is_file()


def test_the_command(tmp_path):
    """Without torch; the finding and the picture, elsewhere when asked; nothing is written where it cannot be."""
    shutil.copytree(RECORDS / "blind", tmp_path / "run")
    argv = [sys.executable, "-X", "importtime", "doctor.py", str(tmp_path / "run")]
    done = subprocess.run([*argv, "--out", str(tmp_path / "x.png")], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 2 and lines[1].startswith("D blind: ")
    assert " torch\n" not in done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "run" / "doctor.png").exists()
    for out in ("x.jpg", "nowhere/x.png", "run/config.json/x.png"):
        with pytest.raises(SystemExit) as left:
            doctor.main([str(tmp_path / "run"), "--out", str(tmp_path / out)])
        assert left.value.code == 2 and not (tmp_path / out).exists()
