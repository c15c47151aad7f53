"""evaluate.py on GenEval- and DPG-shaped prompt files, end to end: layout, resuming, ranks, scores, the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dpg_table import write_csv
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import evaluate
from engine import features, geneval, metrics
from engine.errors import UserError
from engine.pictures import read_picture, to_pil
from toy import world

ENTRIES = [
    {"tag": "single_object", "include": [{"class": "clock", "count": 1}], "prompt": "a photo of a clock"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "colors", "include": [{"class": "clock", "count": 1, "color": "red"}], "prompt": "a photo of a red clock"},
]
ROWS = [  # item, id, dependency, tuple
    ("7", 1, "0", "entity - whole (hat)"),
    ("7", 2, "1", "attribute - color (hat, red)"),
    ("parti3", 1, "0", "global - (night)"),
    ("parti3", 2, "1", "other - count (stars, ==8)"),
]


def evaluated(*argv):
    """The result of evaluate.py in this process; argv's last is the file of --json."""
    evaluate.main([*map(str, argv[:-1]), "--device", "cpu", "--json", str(argv[-1])])
    return json.loads(argv[-1].read_text())


@pytest.fixture(scope="module")
def drawn(small_toys, mask2former, dino, tmp_path_factory):
    """A folder with GenEval-shaped prompts, pictures and a result; and its flags."""
    box = tmp_path_factory.mktemp("geneval")
    (box / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    flags = ["--undistilled", "--model", small_toys["sdxl"], "--steps", 1, "--prompts", box / "metadata.jsonl"]
    flags += ["--benchmark", "geneval", "--per-prompt", 2]
    judges = ["--judge", mask2former[0], "--clip", "toy/clip", "--features", dino]
    evaluated(*flags, *judges, "--images", box / "one", box / "one.json")
    return box, flags, judges


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


def test_geneval(drawn, dino):
    """The published layout; the scores are those of the kept detections by the rules, colour by colour."""
    box, *_ = drawn
    result, scores = (json.loads((box / name).read_text()) for name in ("one.json", "one/scores.json"))
    names = [f"{i:05d}/samples/{k:04d}.png" for i in range(3) for k in range(2)]
    assert sorted(bytes_of(box / "one")) == names
    assert [json.loads((box / "one" / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(3)] == ENTRIES
    kept = next((box / "one").glob("detections-*"))
    found = [json.loads((kept / f"{i:05d}.json").read_text()) for i in range(3)]
    right = [[not geneval.mistakes(entry, seen) for seen in pictures] for entry, pictures in zip(ENTRIES, found)]
    assert right[:2] == [[True, True], [False, False]] and scores["columns"]["right"] == right
    clocks = [d for seen in found[2] for d in seen if "color" in d]
    assert len(clocks) == 2 and all(d["color"] in geneval.COLORS for d in clocks)
    colors = sum(right[2]) / 2
    assert result["geneval_tasks"] == {"single_object": 0.5, "colors": colors}
    assert result["geneval"] == pytest.approx((0.5 + colors) / 2) and result["num"] == 3
    assert scores["notes"][1] == ["0 of 1 dog"] * 2 and "mask2former" in result["judge"]
    images = torch.stack([read_picture(box / "one" / name) for name in names])
    clip = metrics.Clip("toy/clip")
    cosines = clip.score(clip.features(images), [e["prompt"] for e in ENTRIES for _ in range(2)])
    assert result["CLIP"] == pytest.approx(cosines.mean().item(), abs=1e-4)
    f = features.features(features.encoder(dino), [box / "one" / name for name in names], bar="")
    pairs = 1 - torch.cosine_similarity(f[::2], f[1::2])
    assert result["diversity"] == pytest.approx(pairs.mean().item(), abs=1e-4)
    assert result["diversity_error"] == pytest.approx((pairs.std() / 3**0.5).item(), abs=1e-4)


def test_it_goes_on(drawn):
    """Stopped between pictures, within one, between judgements: the same files and the same result in the end."""
    box, flags, judges = drawn
    shutil.copytree(box / "one", box / "stopped")
    kept = next((box / "stopped").glob("detections-*"))
    for lost in ("00001/samples/0000.png", "00002/samples/0001.png", f"{kept.name}/00002.json", "scores.json"):
        (box / "stopped" / lost).unlink()
    (box / "stopped" / "00002/samples/0001.part").write_bytes(b"\x89PNG")
    judged = (kept / "00000.json").stat().st_mtime_ns
    result = evaluated(*flags, *judges, "--images", box / "stopped", box / "stopped.json")
    assert result == json.loads((box / "one.json").read_text()) | {"images": str(box / "stopped")}
    assert bytes_of(box / "stopped") == bytes_of(box / "one") and (kept / "00000.json").stat().st_mtime_ns == judged
    assert (kept / "00002.json").read_text() == (box / "one" / kept.name / "00002.json").read_text()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_draw_what_one_draws(drawn, two_ranks, monkeypatch):
    """Batches of two, so that each rank draws some: the pictures are the same to the bit, the scores too."""
    box, flags, judges = drawn
    argv = [str(flag) for flag in (*flags, *judges, "--num", 2, "--images", box / "two", "--json", box / "two.json")]
    program = "import evaluate\nfrom engine import pictures\npictures.at_once = lambda *size: 2\n"
    two_ranks(program + f"evaluate.main({argv})")
    monkeypatch.setattr("engine.pictures.at_once", lambda *size: 2)
    one = evaluated(*flags, *judges, "--num", 2, "--images", box / "alone", box / "alone.json")
    assert bytes_of(box / "two") == bytes_of(box / "alone") and len(bytes_of(box / "two")) == 4
    two = json.loads((box / "two.json").read_text())
    for key in ("geneval", "geneval_pictures", "CLIP", "diversity"):
        assert two[key] == pytest.approx(one[key], abs=2e-4)
    kept = [next((box / name).glob("detections-*")) for name in ("two", "alone")]
    seen = [[json.loads(path.read_text()) for path in sorted(where.glob("*.json"))] for where in kept]
    assert len(seen[0]) == 2 and [len(d) for p in seen[0] for d in p] == [len(d) for p in seen[1] for d in p]


def test_report_of_two(drawn, capsys):
    box, *_ = drawn
    evaluate.main(["--compare", str(box / "one.json"), str(box / "one.json"), "--num", "2"])
    out = capsys.readouterr().out
    assert "| SDXL |" in out and "GenEval" in out and str(box / "one.html") in out
    page = (box / "one.html").read_text()
    assert page.count("data:image/jpeg") == 8 and page.index("a photo of a dog") < page.index("</section>")


@pytest.fixture
def dpg_files(tmp_path):
    write_csv(tmp_path / "dpg_bench.csv", ROWS)
    return tmp_path


def test_dpg(dpg_files, small_toys, vlm):
    """Drawn without a judge, in the grids of the benchmark's program; then judged; then by answers made elsewhere."""
    flags = ["--undistilled", "--model", small_toys["sdxl"], "--steps", 1, "--prompts", dpg_files]
    flags += ["--benchmark", "dpg", "--images", dpg_files / "pictures"]
    result = evaluated(*flags, dpg_files / "drawn.json")
    assert "dpg" not in result and result["num"] == 2
    grid = Image.open(dpg_files / "pictures" / "grids" / "7.png")
    third = Image.open(dpg_files / "pictures" / "7" / "0002.png")
    assert grid.size == (128, 128) and grid.crop((0, 64, 64, 128)).tobytes() == third.tobytes()
    result = evaluated(*flags, "--judge", vlm, dpg_files / "judged.json")
    kept = next((dpg_files / "pictures").glob("answers-*"))
    p = {item: json.loads((kept / f"{item}.json").read_text()) for item in ("7", "parti3")}
    points = [(a["1"] > 0.5) * (1 + (a["2"] > 0.5)) / 2 for item in ("7", "parti3") for a in p[item]]
    assert result["dpg"] == pytest.approx(100 * sum(points) / 8, abs=1e-3) and "vlm" in result["judge"]
    assert result["dpg_released_items"] == 1  # the first row is skipped, and question 2 depends on it
    given = {item: [{"1": "yes", "2": "no"}] * 4 for item in ("7", "parti3")}
    (dpg_files / "answers.json").write_text(json.dumps({"judge": "mPLUG-large", "answers": given}))
    result = evaluated(*flags, "--scores", dpg_files / "answers.json", dpg_files / "given.json")
    assert result["dpg"] == 50 and result["judge"] == "mPLUG-large" and result["dpg_categories"]["entity"] == 100


def test_plain_prompts_several_times_and_real_pictures(small_toys, dino, tmp_path):
    """--per-prompt gives diversity on any file of prompts; --real's statistics, saved, give the same distance."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    flags = ["--undistilled", "--model", small_toys["sdxl"], "--steps", 1, "--prompts", tmp_path / "prompts.txt"]
    flags += ["--per-prompt", 3, "--images", tmp_path / "pictures", "--features", dino]
    scores = tmp_path / "hps.json"
    scores.write_text('{"HPSv2": [1, 2, 3, 4, 5, 6]}')
    more = ["--real", tmp_path / "pictures", "--scores", scores]
    (tmp_path / "pictures").mkdir()
    result = evaluated(*flags, *more, tmp_path / "a.json")
    assert sorted(bytes_of(tmp_path / "pictures")) == [f"{i:05d}/{k:04d}.png" for i in range(2) for k in range(3)]
    assert result["diversity"] > 0 and abs(result["fd_dino"]) < 1e-3 and result["precision"] == 1
    assert result["HPSv2"] == 3.5
    columns = json.loads((tmp_path / "pictures" / "scores.json").read_text())["columns"]
    assert columns["HPSv2"] == [[1, 2, 3], [4, 5, 6]]
    statistics = next((tmp_path / "pictures").glob("real-*.npz"))
    again = evaluated(*flags, "--real", statistics, tmp_path / "b.json")
    assert again["fd_dino"] == pytest.approx(result["fd_dino"], abs=1e-3) and "precision" not in again


@pytest.mark.parametrize(
    "argv, why",
    [
        ("--judge toy/clip", "--judge needs --prompts"),
        ("--prompts DIR/a.jsonl --images DIR/p", "add --benchmark geneval"),
        ("--prompts DIR --images DIR/p", "add --benchmark dpg"),
        ("--prompts DIR/a.txt --images DIR/p --judge toy/clip", "--judge needs --benchmark"),
        ("--prompts DIR/a.txt --images DIR/p --real DIR", "--real needs --features"),
        ("--prompts DIR/a.txt --images DIR/p --features DIR/none", "DIR/none"),
        ("--prompts DIR/a.txt --benchmark geneval --images DIR/p", "line 1"),
        ("--prompts DIR/a.txt --benchmark dpg --images DIR/p", "lacks the column"),
        ("--prompts DIR/a.jsonl --benchmark geneval --images DIR/p --judge DIR/none.pth", "none.pth"),
        ("--prompts DIR/a.jsonl --benchmark geneval --images DIR/p --judge toy/clip --clip toy/clip", "is a clip"),
    ],
)
def test_mistakes(argv, why, small_toys, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(ENTRIES[0]))
    (tmp_path / "a.txt").write_text("a red circle\n")
    argv = ["--undistilled", "--steps", "1", *argv.replace("DIR", str(tmp_path)).split()]
    with pytest.raises(SystemExit) as e:
        evaluate.main([*argv, "--model", small_toys["sdxl"]])
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and err.startswith("error: ") and why.replace("DIR", str(tmp_path)) in err


def test_fid_is_of_inceptions_features(tmp_path, monkeypatch):
    """Of torch-fidelity's own network with random weights: its features, and a distance to saved statistics."""
    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(net.state_dict(), path)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    images = [world.render(world.scene(i, "test")[0]) for i in range(3)]
    for file, image in zip(files, images):
        to_pil(image).save(file)
    encode = features.encoder(path)
    found = features.features(encode, files, bar="")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        torch.testing.assert_close(found, net.eval()(pixels)[0].float(), atol=1e-5, rtol=1e-4)
    mean, covariance = metrics.gaussian(found)
    np.savez(tmp_path / "real.npz", mu=mean + 1, sigma=covariance)
    distance = features.distances(encode, found, features.reference(encode, tmp_path / "real.npz"))
    assert distance == {"fid": pytest.approx(2048, rel=1e-3)}  # the means are 1 apart in each of 2048 numbers

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"weights": Harmful()}, path)
    with pytest.raises(UserError, match="cannot read Inception's weights"):
        features.encoder(path)
    assert not (tmp_path / "touched").exists()
