"""README and docs name what exists: files, functions, flags, modules, links; docs/paper.md lists the code's marks."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import evaluate
import export
import sample
from engine.config import METHODS
from lab import notes
from siblings import settings_of

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md")), *sorted(Path("results").glob("*.md"))]
TEXT = {str(page): page.read_text() for page in PAGES}
OTHERS = {  # flags of torchrun, Slurm, pip, pytest, and of lab's commands
    *"--nproc-per-node --nnodes --max-restarts --standalone --shutdown-timeout --rdzv-backend --rdzv-endpoint".split(),
    *"--rdzv-id --kill-on-bad-exit --nodes --gpus-per-node --ntasks-per-node --cpus-per-task --signal".split(),
    *"--only --seeds --print --quick --size --repeats --jobs --rebuild --images --help --index-url".split(),
    *"--frozen --states --steps --block --reals".split(),
}


def flags_of_ours():
    """Every flag of train.py with any method, and of the other scripts."""
    found = {f"--{f.name.replace('_', '-')}" for method in METHODS for f in fields(settings_of(method))}
    for script in (sample, evaluate, export):
        found |= set(re.findall(r'"(--[a-z-]+)"', Path(script.__file__).read_text()))
    return found


@pytest.mark.parametrize("page", TEXT)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT[page]))
    assert named <= flags_of_ours() | OTHERS


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXT[page]):
        if not target.startswith("http"):
            assert (Path(page).parent / target).exists(), target


@pytest.mark.parametrize("page", TEXT)
def test_files_and_modules_exist(page):
    """Files in code font, and modules of `python -m`."""
    for name in set(re.findall(r"`([\w/]+\.(?:py|md|json|png))`", TEXT[page])):
        made = name in ("metrics.json", "config.json", "settings.json") or name.startswith(
            ("runs/", "DIR/")
        )  # by a command
        assert made or Path(name).exists() or Path("tests", name).exists(), name
    for name in set(re.findall(r"python -m ((?:lab|toy)[\w.]*)", TEXT[page])):
        assert Path(*name.split(".")).with_suffix(".py").exists(), name


@pytest.mark.parametrize("page", TEXT)
def test_functions_exist(page):
    """`file.py`: `function`, `another`: each is defined at the top level of that file."""
    pairs = re.findall(r"`((?:\w+/)?\w+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT[page])
    assert pairs or page != "README.md"
    for name, functions in pairs:
        path = Path("tests", name) if name.startswith("test_") else Path(name)
        defined = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
        assert set(re.findall(r"`(\w+)`", functions)) <= defined, name


def test_readme_is_one_page():
    text = TEXT["README.md"]
    assert len(text.splitlines()) <= 220 and len(text.encode()) <= 14_000


def test_the_list_of_assumptions_is_the_codes():
    """Renewed by `python -m lab.notes`; every mark of the paper's files is in it, at its line."""
    assert notes.page() == TEXT["docs/paper.md"]
    for path in (*Path().glob("*.py"), *Path("siblings").glob("*.py"), *Path("engine").glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\b(ASSUMPTION|NOTE):", line):
                assert f"({'../' + str(path)}#L{number})" in TEXT["docs/paper.md"]
