"""Diversity, distances to real pictures, and the report: table, page."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from engine import features, metrics, report
from engine.errors import UserError


def test_cosine_diversity():
    """Equal pictures 0, orthogonal 1, two equal pairs 2/3; random ones by the definition, whatever their norms."""
    e = torch.eye(4)
    groups = torch.cat([e[[0, 0, 0, 0]], e, e[[0, 0, 1, 1]]])
    assert torch.allclose(metrics.cosine_diversity(groups, 4), torch.tensor([0, 1, 2 / 3], dtype=torch.float64))
    f = torch.randn(15, 7) * torch.rand(15, 1)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    for group, d in zip(f.split(5), metrics.cosine_diversity(f, 5)):
        cosines = [torch.cosine_similarity(group[i], group[j], dim=0).item() for i, j in pairs]
        assert d.item() == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    mean, error = metrics.mean_and_error(torch.tensor([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert metrics.mean_and_error(torch.tensor([1.0])) == (1, None)


def save_pictures(folder, n, seed, side=32):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return sorted(folder.glob("*.png"))


def test_distances_to_a_folder_and_to_its_statistics(dino, tmp_path):
    """The same distance from pictures and from their mu and sigma; a picture's features don't depend on the batch."""
    ours = save_pictures(tmp_path / "ours", 12, 0)
    real = save_pictures(tmp_path / "real", 20, 1)
    encode = features.encoder(dino)
    found = features.features(encode, ours, bar="")
    assert torch.allclose(found, features.features(encode, ours, bar="", batch=5), atol=1e-5)
    by_folder = features.distances(encode, found, features.reference(encode, tmp_path / "real", bar=""))
    mean, covariance = (value.numpy() for value in metrics.gaussian(features.features(encode, real, bar="")))
    assert np.allclose(covariance, np.cov(features.features(encode, real, bar="").double().numpy().T))
    np.savez(tmp_path / "real.npz", mu=mean, sigma=covariance)
    by_statistics = features.distances(encode, found, features.reference(encode, tmp_path / "real.npz"))
    assert by_statistics == {"fd_dino": pytest.approx(by_folder["fd_dino"], rel=1e-6)}
    assert by_folder.keys() == {"fd_dino", "precision", "recall"} and by_folder["fd_dino"] > 0
    itself = features.distances(encode, found, features.reference(encode, tmp_path / "ours", bar=""))
    assert abs(itself["fd_dino"]) < 1e-6 and itself["precision"] == itself["recall"] == 1
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", mu=mean[:3], sigma=covariance[:3, :3])
    for path, why in [("empty", "0 pictures"), ("none.npz", "none.npz"), ("real/000.png", "npz with mu and sigma")]:
        with pytest.raises(UserError, match=why):
            features.reference(encode, tmp_path / path)
    with pytest.raises(UserError, match="features of 3 numbers"):
        features.distances(encode, found, features.reference(encode, tmp_path / "other.npz"))
    with pytest.raises(UserError, match="clip"):
        features.encoder("toy/clip")


PROMPTS = ["a <b>cat</b> & a dog", "two cats", "a bird"]


def result(folder, name, right, **more):
    """A result file with its folder of pictures, one per prompt; right: of each prompt."""
    folder.mkdir()
    files = [path.name for path in save_pictures(folder / "pictures", len(PROMPTS), len(name))]
    scores = {"prompts": PROMPTS, "files": [[f"pictures/{file}"] for file in files]}
    scores |= {"columns": {"right": [[r] for r in right], "CLIP": [[0.25]] * 3}}
    scores |= {"notes": [["" if r else "1 of 2 cat"] for r in right]}
    (folder / "scores.json").write_text(json.dumps(scores))
    content = {"name": name, "nfe": 4, "seed": 0, "images": str(folder)} | more
    (folder.parent / f"{name}.json").write_text(json.dumps(content))
    return folder.parent / f"{name}.json"


def test_compare(tmp_path):
    """One table with the papers' rows; a page that needs nothing else, prompts escaped, the student's worst first."""
    scores = {"geneval": 0.5, "geneval_tasks": {"counting": 0.25}, "diversity": 0.4, "diversity_error": 0.01}
    teacher = result(tmp_path / "a", "teacher", [True, True, True], **scores)
    student = result(tmp_path / "b", "stu|dent", [True, False, True], dpg=81.25, judge="Qwen")
    table = report.compare([teacher, student], tmp_path / "new" / "report.html")
    lines = table.splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    heading = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    rows = {row[0]: dict(zip(heading, row)) for row in ([c.strip() for c in li.split("|")[1:-1]] for li in lines[2:])}
    assert rows["**teacher**"]["GenEval"] == "0.5000" and rows["**teacher**"]["counting"] == "0.2500"
    assert rows["**teacher**"]["diversity"] == "0.4000 ± 0.0100" and rows["**teacher**"]["DPG"] == ""
    part = {"name": "some", "benchmark": "geneval", "num": 6}
    assert report.title(part) == "some (6 prompts)" and report.title(part | {"num": 553}) == "some"
    assert rows["SDXL"]["DPG as released"] == "74.65" and rows["SDXL"]["judge"] == "mPLUG-large"
    assert "| **stu\\|dent** | 4 |" in table
    page = (tmp_path / "new" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and page.count("data:image/jpeg;base64,") == 6
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["two cats", "a &lt;b&gt;cat&lt;/b&gt; &amp; a dog", "a bird"]
    first = page.split("<section>")[1]
    assert first.index("teacher") < first.index("stu|dent") and first.count('class="wrong"') == 1
    assert "1 of 2 cat" in first and "CLIP 0.2500" in first and "same noise" in page
    report.compare([teacher, student], tmp_path / "report.html", most=1)
    assert (tmp_path / "report.html").read_text().count("<section>") == 1
    moved = result(tmp_path / "c", "other", [True, False, True], seed=1)
    (tmp_path / "c" / "pictures" / "001.png").unlink()
    report.compare([teacher, moved], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "differ in seed" in page and page.count("missing") == 1


def test_compare_of_numbers_alone(tmp_path):
    """Results without pictures, older ones too: a table; what is no result is named."""
    old = tmp_path / "old.json"
    old.write_text('{"frechet": 12.5, "precision": 0.75, "nfe": 4, "reward": null}')
    table = report.compare([old], tmp_path / "page.html")
    assert "| **old** | 4 | 12.50 | 0.7500 |" in table and "<section>" not in (tmp_path / "page.html").read_text()
    for content in ("[", "[1, 2]", "3"):
        old.write_text(content)
        with pytest.raises(UserError, match="old.json"):
            report.compare([old], tmp_path / "page.html")
    with pytest.raises(UserError, match="none.json"):
        report.compare([tmp_path / "none.json"], tmp_path / "page.html")
