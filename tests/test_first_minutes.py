"""What a newcomer meets first: the threads of every script, the demo, the student that comes along."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
import evaluate
import sample
from engine import run_folder
from lab import demo

VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WEIGHTS = 40e6  # bytes that all weights may have together


@pytest.mark.parametrize("package", ["engine", "lab"])
@pytest.mark.parametrize("own", [{}, {"OMP_NUM_THREADS": "3"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_threads_are_set_before_torch_is_loaded(package, own):
    """One per idle core and a short spin; nothing where the user has set one of OpenMP's variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))} | own
    program = f"import os, sys, {package}; print('torch' in sys.modules, *map(os.environ.get, {VARIABLES}))"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    loaded, *found = done.stdout.split()
    expected = own or dict(zip(VARIABLES, (found[0], 1000, 0)))
    assert loaded == "False" and found == [str(expected.get(name)) for name in VARIABLES]
    assert own or 1 <= int(found[0]) <= engine.cores() <= os.cpu_count()


@pytest.mark.parametrize("busy, threads", [(0, 4), (1, 4), (3, 3), (5, 1), (9, 1)])
def test_busy_cores_get_no_thread(busy, threads, monkeypatch):
    """6 CPUs, of which this process may use 4."""
    monkeypatch.setattr(engine, "cores", lambda: 4)
    monkeypatch.setattr(engine, "others", lambda: busy)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    environ = {}
    engine.set_threads(environ)
    assert environ["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.skipif(not Path("/proc/loadavg").is_file(), reason="counts what runs on Linux")
def test_others_are_counted():
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert engine.others() >= 3
    finally:
        for process in spinning:
            process.kill()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "export.py"])
def test_scripts_load_engine_before_torch(script):
    """`engine` sets the threads, so nothing but the standard library comes before it."""
    for line in ast.parse(Path(script).read_text()).body:
        names = [a.name for a in line.names] if isinstance(line, ast.Import) else [getattr(line, "module", "")]
        if isinstance(line, ast.Import | ast.ImportFrom) and names[0].partition(".")[0] not in sys.stdlib_module_names:
            assert names[0].partition(".")[0] == "engine"
            return
    raise AssertionError(f"{script} does not import engine")


def test_demo(small_toys, tmp_path, monkeypatch, capsys):
    """Its commands in short: what happens and how long it takes is said, numbers are those of the JSON files."""
    short = f"--model {small_toys['sdxl']} --batch-size 2 --preview-every 9 --iterations"
    monkeypatch.setattr(demo, "STAGE_1", f"{short} 1")
    monkeypatch.setattr(demo, "STAGE_2", f"{short} 2 --rl-ratio 1")
    monkeypatch.setattr(demo, "EVALUATED", 16)
    out = tmp_path / "a demo"
    demo.main(["--out", str(out), "--seed", "3"])
    said = capsys.readouterr().out
    one, two = (json.loads(Path(f"{out}{end}", "metrics.json").read_text()) for end in ("", "-stage2"))
    for metrics in (one, two):
        assert f"{100 * metrics['prompt_accuracy']:.1f} %" in said and f"{metrics['reward']:.2f}" in said
        assert f"{metrics['frechet']:.2f}" in said and metrics["num"] == 16
    assert all(f"[{n}/5]" in said for n in range(1, 6)) and said.count(" left\n") == 4 and "both stages in" in said
    for picture in (f"{out}-stage2/preview-000002.png", f"{out}-stage2/samples/grid.png"):
        assert Path(picture).is_file() and picture in said
    assert json.loads((Path(f"{out}-stage2") / "config.json").read_text())["seed"] == 3


def test_parts_of_the_demos_time():
    assert sum(step.part for step in demo.steps("runs/demo")) == pytest.approx(1)


def test_the_student_that_comes_along(tmp_path, monkeypatch, capsys):
    """On a fresh clone: its pictures fit their prompts, it says which student drew, nothing is written beside it."""
    assert sum(path.stat().st_size for path in (run_folder.SHIPPED / "unet").iterdir()) <= 6.5e6
    assert "_name_or_path" not in (run_folder.SHIPPED / "unet" / "config.json").read_text()  # a path of one machine
    monkeypatch.chdir(tmp_path)
    sample.main(["--steps", "4", "--out", "drawn"])
    assert "toy/student" in capsys.readouterr().out and len(list(Path("drawn").glob("0*.png"))) == 8
    evaluate.main(["--num", "40", "--json", "found.json"])
    assert json.loads(Path("found.json").read_text())["prompt_accuracy"] >= 0.85


def test_all_weights_are_small():
    """Distinct files, counted once."""
    files = {p.resolve() for kind in ("*.safetensors", "*.pt", "*.bin") for p in Path("toy").rglob(kind)}
    files = {p for p in files if ".build" not in p.parts}
    assert 20e6 < sum(p.stat().st_size for p in files) <= WEIGHTS
