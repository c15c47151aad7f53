"""docs/walkthrough.md, its pictures, docs/index.html: whole, up to date, self-contained; one version everywhere."""

import re
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from engine.errors import UserError
from lab import figures, figures_shared, notes, page

TEXT = page.SOURCE.read_text()
INTRO, STATIONS = page.stations(TEXT)


def test_links_lead_to_their_functions():
    """Lines of a link move with the code: `make page`, or `python -m lab.notes`, renews them."""
    assert notes.linked(TEXT) == TEXT
    first = STATIONS[0].functions[0]
    path, line = re.search(r"\(\.\./(\w+\.py)#L(\d+)\)", TEXT).groups()
    assert Path(path).read_text().splitlines()[int(line) - 1].startswith(f"def {first[1]}(")
    assert notes.linked(TEXT.replace(f"#L{line})", "#L1)")) == TEXT


def test_a_link_to_nothing_is_named():
    with pytest.raises(UserError, match="no_such_function in dmd.py"):
        notes.linked("[`dmd.py`: `no_such_function`](../dmd.py#L1)")


@pytest.mark.parametrize("lost, named", [("**Try it:**", "Try it"), (STATIONS[3].picture, "lab.figures --only gone")])
def test_a_station_that_is_not_whole_is_named(lost, named):
    with pytest.raises(UserError, match=named.replace("*", "")):
        page.stations(TEXT.replace(lost, "walkthrough/gone.png" if "/" in lost else "Try"))


def test_ten_stations_cover_the_equations():
    named = " ".join(s.title for s in STATIONS)
    assert len(STATIONS) == 10 and "Algorithm 1" in named
    assert set(re.findall(r"\d+", re.sub(r"\b\d+\. ", "", named.replace("Algorithm 1", "")))) == {
        *map(str, range(1, 14))
    }


@pytest.mark.parametrize("station", STATIONS, ids=lambda s: s.title)
def test_a_station_is_whole(station):
    """An idea of five sentences at most, a formula, code, what is left open, a picture with words, a command."""
    idea = station.words.strip().split("```math")[0]
    assert 1 <= len(re.findall(r"[.?](?=\s)", idea)) <= 5
    assert "```math" in station.words and "**Left open, and our choice.**" in station.words
    assert station.functions and station.alt and station.caption.strip()
    assert re.search(r"\*\*Try it:\*\* .*\n\n    (python|make) ", station.words)


def test_each_picture_is_one_of_the_commands():
    assert [Path(s.picture).stem for s in STATIONS] == list(figures.FIGURES)
    for station in STATIONS:
        path = Path("docs", station.picture)
        assert path.stat().st_size < 250_000, path
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width >= 1000


def test_figures_are_drawn_by_the_command(tmp_path, monkeypatch, capsys):
    """The real thing, for a picture that needs no run: the student's rollout."""
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main(["--only", "rollout"])
    with Image.open(tmp_path / "rollout.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # pictures, no empty frame
    with pytest.raises(SystemExit) as ended:
        figures.main(["--only", "rolout"])
    assert ended.value.code == 2 and "rolout" in capsys.readouterr().err


def test_a_missing_run_is_trained_though_a_picture_is_drawn_without_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_shared, "RUNS", tmp_path)
    few = "--stage 1 --method dmd2 --ttur 1 --batch-size 1 --iterations 1 --preview-every 0 --log-every 1"
    monkeypatch.setitem(figures_shared.FLAGS, "dmd2", few)
    with torch.no_grad():
        figures_shared.trained.__wrapped__("dmd2")
    assert figures_shared.finished("dmd2", 1)


# ----------------------------------------------------------------------------------------------- index.html


@pytest.fixture(scope="module")
def built():
    return page.page()


def test_the_page_is_built_from_walkthrough_and_sources(built):
    assert built == page.PAGE.read_text(), "docs/index.html is stale: make page"


def test_a_formula_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match="cannot read this formula.*aligned"):
        page.tree(r"\begin{aligned} a & b \end{aligned}", True)


def test_the_page_stands_alone(built):
    """No JavaScript, nothing that is loaded from elsewhere; it parses as XML, so no tag is left open."""
    assert not re.search(r"<script|<link|@import|url\(|\son\w+=", built)
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r'src="([^"]{0,40})', built))
    tree = ET.fromstring(re.sub(r"<!doctype html>|<meta [^>]*>|<img [^>]*>|<br>", "", built))
    assert len(tree.findall(".//section")) == 10 and len(tree.findall(".//nav//a")) == 10
    for link in tree.findall(".//nav//a"):
        assert tree.find(f".//section[@id='{link.get('href')[1:]}']") is not None
    shown = "".join(tree.find(".//section[@id='s2']//figure[@class='code']/pre").itertext())
    assert "return -(x_t - alpha_t * x_0) / sigma_t**2" in shown


def test_a_symbol_has_one_colour_in_formula_and_code(built):
    """Station 2, by hand: the teacher's estimate is green in the formula, in the code, and nowhere in red."""
    start = built.index('id="s2"')
    section = built[start : built.index("</section>", start)]
    math, code = section.split('<div class="listing">')
    assert re.search(r'<msubsup class="real"><mi>x</mi><mn>0</mn>', math)
    assert re.search(r'<msubsup class="fake"><mi>x</mi><mn>0</mn>', math)
    assert set(re.findall(r'class="(\w+)">x0_real<', code)) == {"real"}
    assert set(re.findall(r'class="(\w+)">x0_fake<', code)) == {"fake"}


def test_every_colour_is_in_the_style():
    style = page.STYLE.read_text()
    dark = style.index("prefers-color-scheme: dark")
    for colour in {colour for colour, *_ in page.SYMBOLS}:
        assert f".{colour} {{" in style
        assert f"--{colour}:" in style[:dark] and f"--{colour}:" in style[dark:]


def test_names_have_one_colour():
    colours = {}
    for colour, latex, name in page.SYMBOLS:
        for key in filter(None, (latex, name)):
            assert colours.setdefault(key, colour) == colour, key


# ------------------------------------------------------------------------------------------------ the version


def test_version_is_one():
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load(Path("CITATION.cff").read_text())
    assert citation["version"] == version
    assert len(citation["preferred-citation"]["authors"]) == 8
    assert re.search(r"^## (\S+)", Path("CHANGELOG.md").read_text(), re.M)[1] == version
