"""The lab's rules: what a row is named by, what a verdict and a share are, what the pages say. Nothing trains."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import train
from engine import config
from engine.models import load_denoiser
from engine.run_folder import SHIPPED, saved_settings
from lab import claims, cost, discriminator, pages, rows, siblings, stage1, stage2, steps
from lab.claims import values
from lab.cost import BASELINE, TUNED, headline, share
from lab.verdicts import at_best, verdict


def run(*points):
    """A run's points from (samples, Fréchet distance, share of prompts right); a pass is two samples, a second ten."""
    made = []
    for n, f, a in points:
        made.append({"samples": n, "passes": 2 * n, "seconds": n / 10, "frechet": f, "prompt_accuracy": a})
    return made


def test_two_standard_errors_decide():
    """By hand: variances 1 and 0 over three seeds each make a standard error of sqrt(1/3). Fewer decide nothing."""
    gain, error, decided = verdict([4.0, 5.0, 6.0], [3.0, 3.0, 3.0], 1)
    assert (gain, error, decided) == (2.0, pytest.approx(3**-0.5), "holds")
    assert verdict([4.0, 5.0, 6.0], [3.0, 3.0, 3.0], -1)[2] == "does not hold"
    assert verdict([4.0, 5.0, 6.0], [4.0, 4.0, 4.0], 1)[2] == "within noise"  # 1 < 2 x 0.577
    assert verdict([4.0], [3.0, 3.0, 3.0], 1) == (1.0, None, "1 of 3 seeds, not decided")
    assert verdict([4.0, 5.0, 6.0], [4.0, 3.0], 1) == (1.5, None, "2 of 3 seeds, not decided")


def test_claims_point_where_the_paper_points():
    """Where it prints figures of both sides, the better one's is the better figure: the higher, of FID the lower.

    Of our measures less is better in two.
    """
    for c in claims.CLAIMS:
        if figures := re.findall(r"\d+\.\d+|\d{3}", c.paper):
            better, worse = map(float, figures)
            assert (better < worse) if "FID" in c.paper else (better > worse), c.text
    assert {c.measure for c in claims.CLAIMS if c.sign() < 0} == {"frechet", "contrast"}
    larger = {"prompt_accuracy", "clip_score", "reward", "recall", "variation"}
    assert {c.measure for c in claims.CLAIMS if c.sign() > 0} == larger


def test_sweeps_are_of_equal_size():
    count = lambda table: sum(len(seeds) for _, seeds in stage1.TABLES[table].values())  # noqa: E731
    assert count("dmd2-sweep") - 1 == count("sweep")  # beside the defaults


def test_the_best_point_is_chosen_by_the_other_seeds():
    """By hand: the mean of the others is best in the middle, so 5 is taken, not 4.

    The last point is no choice: it is what the best is set beside.
    """
    assert at_best([[4, 5, 1], [9, 2, 6], [9, 1, 7]], -1) == [5, 2, 1]
    assert at_best([[9, 5, 1]], -1) == [5]
    assert at_best([[9, 5, 1], [8, 2, 3]], 1) == [9, 8]


def test_a_claim_may_ask_for_a_point_of_each_side():
    """Hand-made runs of all seeds: values seed by seed at the first, at the last and at the best point."""
    title = cost.DMD2_TTUR2
    points = run((1, 5.0, 0.1), (2, 3.0, 0.1), (3, 4.0, 0.1))
    measured = {cost.name(cost.METHODS[title], s, 1000): points for s in rows.SEEDS}
    of_points = [values(measured, title, "frechet", -1, p, 1000) for p in (0, -1, "best")]
    assert of_points == [[5.0] * 3, [4.0] * 3, [3.0] * 3]
    assert values(measured, title, "frechet", -1, 0, 200) == []


def test_every_claim_names_rows_that_can_be_run():
    for c in claims.CLAIMS:
        for title, point in zip((c.better, c.worse), c.points):
            assert values({}, title, c.measure, c.sign(), point, 1000) == []
            assert point == -1 or title in claims.METHODS


@pytest.fixture
def asked(monkeypatch):
    """The rows that a call with nothing there would run, filled as parts are asked to train: {file: names}."""
    asked = defaultdict(set)
    monkeypatch.setattr(rows, "load", lambda path, **weights: {})
    monkeypatch.setattr(rows, "fill", lambda path, results, jobs, workers: asked[path].update(jobs))
    monkeypatch.setattr(stage1, "student", lambda *args: None)
    return asked


def test_all_parts_run_all_that_the_claims_need(asked):
    """With nothing there, the rows that the parts would run give every claim both its sides, of all SEEDS."""
    for run_part in claims.TRAIN.values():
        run_part(1000, 2)
    blank = defaultdict(float)
    measured = {}
    for n in set().union(*asked.values()):
        measured[n] = [blank] * cost.POINTS if n.endswith("points") else blank
    for c, better, worse, *_ in claims.assess(measured, 1000):
        assert len(better) == 3 and len(worse) == 3, c


def test_no_row_is_missing(asked):
    """Every row of every table is in results/, under the name that its flags give it today, and no row is left over."""
    for run_part in claims.TRAIN.values():
        run_part(1000, 2)
    stage1.train(stage1.TABLES, 1000, 2)
    assert len(asked) == 5
    for path, names in asked.items():
        there = {n for n in json.loads(path.read_text()) if not n.endswith("_crc32")}
        assert there == names, path


PAGES = {"stage1": stage1, "cost": cost, "stage2": stage2, "siblings": siblings, "steps": steps, "claims": claims}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_those_of_the_rows(name):
    """A page in results/ is what its module writes from the rows in results/, and no figure in it is missing."""
    text = Path("results", f"{name}.md").read_text()
    assert text == PAGES[name].page()
    assert pages.MISSING not in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert Path("results", link).exists(), link


def test_verdicts_are_those_of_the_rows():
    kept = json.loads(Path("results/verdicts.json").read_text())
    assessed = claims.assess_all(1000)
    assert [v["verdict"] for v in kept] == [a[-1] for a in assessed]
    assert [(v["better"], v["worse"]) for v in kept] == [(a[1], a[2]) for a in assessed]


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_other_prompts_have_no_figures(name):
    """With 200 prompts no row is there: tables are empty, and prose that needs rows is left out."""
    text = PAGES[name].page(200)
    assert ("not run" if name == "claims" else pages.MISSING) in text


def test_prose_without_rows_says_so():
    assert pages.told(lambda found: f"{pages.right(found['a'])} %", {}) == pages.MISSING
    assert pages.told(lambda found: f"{pages.right(found)} %", [{"prompt_accuracy": 0.5}]) == "50.0 %"


def test_share_of_the_baselines_cost():
    """By hand: the baseline is best at 300; Flash-DMD does as well first at 60, a fifth.

    What it never reaches is a bound.
    """
    baseline = run((100, 5.0, 0.7), (200, 4.0, 0.8), (300, 3.0, 0.8), (400, 3.5, 0.9))
    flash = run((30, 3.2, 0.9), (60, 2.9, 0.8), (90, 3.0, 0.9))
    assert share(flash, baseline, {"frechet": -1}) == (0.2, True)
    assert share(flash, baseline, {"prompt_accuracy": 1}) == (30 / 400, True)
    assert share(flash, baseline, {"frechet": -1, "prompt_accuracy": 1}) == (
        90 / 400,
        True,
    )  # both at once: only at the end
    assert share(flash[:1], baseline, {"frechet": -1}, "passes") == (0.1, False)


def test_headline():
    """A line for each criterion, a value for each seed in every kind of cost.

    A baseline that is best at its end is named.
    """
    baseline = run((100, 4.0, 0.8), (200, 3.0, 0.8), (400, 3.5, 0.9))
    runs = {0: run((50, 3.0, 0.7), (100, 2.9, 0.9)), 1: run((50, 3.2, 0.9), (100, 3.1, 0.9)), 2: run((50, 1.0, 1.0))}
    baselines = {0: baseline, 1: baseline[:2]}  # seed 2 has none yet
    lines = headline({"Flash-DMD, TTUR 1": runs, BASELINE: baselines})
    assert lines[2:5] == [
        "| Flash-DMD, TTUR 1, seeds 0, 1 | Fréchet | 25, > 50 % | 25, > 50 % | 25, > 50 % |",
        "| Flash-DMD, TTUR 1, seeds 0, 1 | prompts right | 25, 50 % | 25, 50 % | 25, 50 % |",
        "| Flash-DMD, TTUR 1, seeds 0, 1 | both at once | 25, > 50 % | 25, > 50 % | 25, > 50 % |",
    ]
    assert "in prompts right (seed 0); Fréchet (seed 1):" in lines[-1]
    assert len(headline({})) == 4
    other = {1: run((50, 3.1, 0.8), (100, 3.3, 0.9))}
    tuned = headline({"Flash-DMD, TTUR 1": runs, BASELINE: {0: baseline}, TUNED: other}, TUNED)
    assert tuned[0].startswith(f"| share of {TUNED}'s cost") and tuned[2].endswith(
        "| Fréchet | 200 % | 200 % | 200 % |"
    )
    for points in runs[0]:
        points["seconds"] = None  # a run that was paused
    paused = headline({"Flash-DMD, TTUR 1": runs, BASELINE: baselines})
    assert paused[2].endswith("| 25, > 50 % | ?, > 50 % |")


LATER = {"head", "d_block"}  # than the rows of DMD2 and AdvDMD, which have their defaults


@pytest.mark.parametrize("preset, flags", [("dmd2", cost.DMD2), ("dmdr", siblings.DMDR), ("advdmd", siblings.ADVDMD)])
def test_rows_are_named_by_the_settings_of_their_preset(preset, flags, monkeypatch):
    """All that preset and method change is spelt out, the flags alone make the same run.

    Another value makes another name.
    """
    default = vars(rows.settings("toy"))
    changed = {k for k, v in vars(rows.settings(preset)).items() if v != default.get(k, "") and k not in LATER}
    assert {f"--{name.replace('_', '-')}" for name in changed} <= flags.keys() and "--preset" not in flags
    assert flags["--method"] == preset and {"method", "iterations"} <= changed
    given = [str(f) for f in rows.flat(flags)]
    spelt, named = train.read(given), train.read(["--preset", preset, *given])
    assert vars(spelt) | {"preset": preset} == vars(named)
    names = [f.removeprefix("--").replace("-", "_") for f in flags]
    before = rows.key(stage1.spelt(names, preset), "--seed", 0)
    monkeypatch.setitem(config.PRESETS, preset, config.PRESETS[preset] | {"gan_weight": 0.77})
    assert rows.key(stage1.spelt(names, preset), "--seed", 0) != before


def test_every_row_has_a_name_of_its_own():
    names = [cost.name(f, 0, 1000) for f in claims.METHODS.values()]
    names += [stage2.name(f, 0, 1000) for f in (stage2.TABLE4 | stage2.TABLE7).values()]
    for table in ("main", "variants", "students", "sd3"):
        names += [stage1.name(f, 0, 1000) for f, _ in stage1.TABLES[table].values()]
    assert len(set(names)) == len(names) and not any("--preset" in n for n in names)


def test_runs_of_lab_steps_are_done_once_and_by_one_call(tmp_path, monkeypatch, capsys):
    """A quick look at DMDR's one-step row: trained, evaluated, on the page and kept; another call keeps its run."""
    monkeypatch.setattr(rows, "RUNS", tmp_path / "lab")
    monkeypatch.setattr("sys.argv", "lab.steps --quick --num 8 --jobs 1 --only dmdr-1 --seeds 1".split())
    out = rows.folder(steps.name("dmdr-1", 1, 8, steps.QUICK))
    out.parent.mkdir()
    code = "import sys, time; from engine import locks; locks.lock(sys.argv[1]); print(1, flush=True); time.sleep(100)"
    held = [sys.executable, "-c", code, out.with_suffix(".lock")]
    with subprocess.Popen(held, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        steps.main()
        other.kill()
    assert "`dmdr-1`" not in capsys.readouterr().out and not out.exists()
    steps.main()
    text = (tmp_path / "lab" / "steps.md").read_text()
    assert "| `dmdr-1` |" in text and "`sd3-advdmd-2`" not in text and pages.MISSING in text
    (row,) = (r for n, r in steps.gathered(8, steps.QUICK).items() if n.startswith("--"))
    assert (row["nfe"], row["num"], row["samples"]) == (1, 8, 8 * steps.QUICK)
    monkeypatch.setattr(rows, "command", None)  # nothing runs a second time
    steps.main()
    assert (tmp_path / "lab" / "steps.md").read_text() == text


def test_runs_of_lab_steps_have_names_and_settings_of_their_own():
    names = [steps.name(row, seed, 1000) for row in steps.RUNS for seed in rows.SEEDS]
    assert len(set(names)) == len(names) == 3 * (2 * 4 + 6)
    for row, flags in steps.RUNS.items():
        config = train.read([str(f) for f in rows.flat(flags)])
        config.check()
        assert config.student_steps == int(re.search(r"-(\d)", row)[1]), row
        assert config.model == ("toy/sd3" if row.startswith("sd3") else "toy/sdxl")


def test_a_look_at_fewer_prompts_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RUNS", tmp_path / "lab")
    assert str(rows.place("results/claims.md", 1000)) == "results/claims.md"
    assert rows.place("results/claims.md", 200) == tmp_path / "lab/claims.md"


@pytest.mark.parametrize("argv", [["--num", "-3"], ["--num", "7"], ["--jobs", "0"]])
def test_bad_numbers_train_nothing(argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lab.cost", *argv])
    with pytest.raises(SystemExit) as ended:
        rows.options("", ("a",))
    assert ended.value.code == 2 and f"argument {argv[0]}: must be at least" in capsys.readouterr().err


def test_hours_of_rows_that_recorded_them():
    """One hour in each of three ways, a row that lies in two files once, and one that recorded nothing."""
    first = {"--iterations 400 a": {"seconds_per_loop": 9.0}, "--iterations 400 b": {}}
    first |= {"teacher": {}, "teacher_crc32": 1}
    others = {"--iterations 400 a": {}, "--iterations 400 d": {"minutes": 60.0}}
    others["--iterations 2000 c"] = [{"seconds": 9.0}, {"seconds": 3600.0}]
    assert claims.hours(first, others).startswith("3.0 hours of training in the 3 of 4 rows")


def test_the_discriminators_page_is_that_of_its_experiments():
    assert discriminator.runs().keys() <= discriminator.kept().keys()
    assert discriminator.page() == Path("results/discriminator.md").read_text()


def test_a_discriminator_alone(capsys):
    """Reals are at the states' noise levels, the last without noise; --frozen trains the head alone; accuracies."""
    settings = saved_settings(SHIPPED)
    seen, S = discriminator.bank(SHIPPED, settings, 4)
    fake = load_denoiser(settings["model"])
    eps, rows = torch.randn(seen.real.shape), torch.arange(4)
    real, made, t, _ = discriminator.pairs(fake, seen, rows, rows, S, eps)
    assert t.tolist() == [749, 499, 249, 0] and torch.equal(made[3], seen.states[3, 3])
    for i in range(3):
        noised = fake.schedule.alpha(S[1:])[i] * seen.real[i] + fake.schedule.sigma(S[1:])[i] * eps[i]
        torch.testing.assert_close(real[i], noised)
    assert torch.equal(real[3], seen.real[3])
    args = discriminator.options("--steps 1 --batch 2 --frozen --block up_blocks.2 --head map".split())
    trained, head, *_ = discriminator.train(args, settings["model"], seen, seen, S)
    same = zip(trained.net.parameters(), fake.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same) and head.net[0].weight.shape[1] == 32
    told = capsys.readouterr().out.splitlines()[-1]
    assert re.findall(r"(z_\d+|x_0) [01][.]\d\d ", told) == ["z_749", "z_499", "z_249", "x_0"]
