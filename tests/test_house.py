"""The rules of the house: who may import whom. Read from the files, nothing is run."""

import ast
from pathlib import Path

import pytest

CONCEPTS = {"diffusion", "dmd", "score_estimator", "pixel_gan", "latent_reward"}
SCRIPTS = {"train", "sample", "evaluate", "export"}
TORCH_FREE = {
    *("engine.errors", "engine.folders", "engine.base_model", "engine.config", "engine.run_folder"),
    *("engine.flags", "engine.text", "engine.layouts", "engine.shards", "engine.locks"),
    *("engine.stopping", "engine.picture_folder", "engine.geneval", "engine.dpg", "engine.coco"),
    *("engine.prompt_set", "engine.report", "engine.reward_layout", "siblings"),
}
ROOMS = ("siblings", "engine", "toy", "lab", "tests")
FILES = [str(path) for folder in (".", *ROOMS) for path in Path(folder).glob("*.py")]


def module(path):
    """siblings/dmd2.py -> siblings.dmd2; a package's __init__.py -> the package."""
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(f): f for f in FILES}


def imports(path, anywhere=True):
    """What a file imports: full module names, of our own files and of packages. anywhere: inside functions too."""
    found = set()
    tree = ast.parse(Path(path).read_text())
    nodes = ast.walk(tree) if anywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else node.module)
    return found


def ours(path):
    """Of a file's imports, those of our own modules."""
    return {name for name in imports(path) if name in MODULES}


def room(name):
    """Where a module is: "concept", "script", or its folder."""
    first = name.split(".")[0]
    return "concept" if first in CONCEPTS else "script" if first in SCRIPTS else first


ALLOWED = {  # room -> rooms that its files may import from; siblings, toy and lab have more to say below
    "concept": {"concept"},
    "engine": {"concept", "engine", "toy"},
    "siblings": {"concept", "engine", "siblings"},
    "script": {"concept", "engine", "siblings"},
    "toy": {"concept", "engine", "siblings", "toy"},
    "lab": {"concept", "engine", "siblings", "toy", "lab", "script"},
    "tests": {"concept", "engine", "siblings", "toy", "lab", "script", "tests"},
}


@pytest.mark.parametrize("name", MODULES)
def test_imports_stay_in_their_rooms(name):
    found = ours(MODULES[name])
    assert {room(other) for other in found} <= ALLOWED[room(name)], f"{name} imports {sorted(found)}"


def test_concepts_need_torch_and_numpy_alone():
    """And of our own files diffusion.py alone."""
    for name in CONCEPTS:
        packages = {other.split(".")[0] for other in imports(MODULES[name])}
        assert packages <= {"torch", "numpy", "math", "dataclasses", "diffusion"}, (name, packages)
        assert ours(MODULES[name]) <= {"diffusion"}, name


def test_engine_knows_of_the_toy_its_world_alone():
    for name in (n for n in MODULES if room(n) == "engine"):
        assert {other for other in ours(MODULES[name]) if room(other) == "toy"} <= {"toy.world"}, name


def test_the_world_imports_nothing_of_ours():
    assert ours(MODULES["toy.world"]) == set()


def test_siblings_do_not_know_each_other():
    """AdvDMD's discriminator is DMD2's; the other files that they share or consist of are no methods."""
    for name in (n for n in MODULES if n.startswith("siblings.")):
        assert not {"siblings.dmdr", "siblings.advdmd"} & ours(MODULES[name]), name


def test_nothing_imports_a_script():
    """Tests and the lab's timings of train.py itself aside."""
    importers = {
        n for n in MODULES if room(n) != "tests" and any(room(other) == "script" for other in ours(MODULES[n]))
    }
    assert importers <= {"lab.bench", "lab.demo", "lab.figures_shared", "lab.scaling"}


def test_no_circles():
    """Each module can be imported before those that import it: peel off what imports nothing that is left."""
    left = {name: ours(path) - {name} for name, path in MODULES.items()}
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_errors_import_nothing():
    assert imports("engine/errors.py") == set()


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_flags_and_folders_are_read_without_torch(name):
    """What a script needs to refuse a mistake imports neither torch nor anything that does, inside functions aside."""
    found = imports(MODULES[name], anywhere=False)
    heavy = {
        other for other in found if other.split(".")[0] in ("torch", "diffusers", "transformers", "segment_anything")
    }
    assert not heavy
    assert {other for other in found if other in MODULES} <= TORCH_FREE


def test_the_root_shows_the_paper():
    """At the top level nothing but what a user types and the paper's concepts."""
    at_root = {Path(f).stem for f in FILES if "/" not in f}
    assert at_root == CONCEPTS | SCRIPTS


def test_sizes():
    """train.py is read in one sitting, a concept or sibling's file too; no line is wider than a reader's window."""
    lines = {f: Path(f).read_text().splitlines() for f in FILES}
    assert len(lines["train.py"]) <= 240
    short = [name for name in MODULES if name in CONCEPTS or room(name) == "siblings"]
    assert not [name for name in short if len(lines[MODULES[name]]) > 200]
    wide = [f"{f}:{n}" for f, text in lines.items() for n, line in enumerate(text, 1) if len(line) > 120]
    assert not wide


def test_train_knows_no_method_but_flash():
    """No branch of train.py asks for another method: it only passes its name on."""
    text = Path("train.py").read_text()
    tree = ast.parse(text)
    tests = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    assert not [t for t in tests for word in ("dmd2", "dmdr", "advdmd", "rewarding") if word in t]
    assert [t for t in tests if ".method" in t] == ["config.method == 'flash'"]
