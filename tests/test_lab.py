"""The lab's rules: what a row is named by, what a verdict and a share are. Nothing trains."""

import re
from collections import defaultdict

import pytest

from engine import config
from lab import claims, cost, rows, siblings, stage1, stage2
from lab.claims import at_best, values, verdict
from lab.cost import BASELINE, TUNED, headline, share


def run(*points):
    """A run's points from (samples, Fréchet distance, share of prompts right); a pass is two samples, a second ten."""
    return [{"samples": n, "passes": 2 * n, "seconds": n / 10, "frechet": f, "prompt_accuracy": a} for n, f, a in points]


def test_two_standard_errors_decide():
    """By hand: variances 1 and 0 over three seeds each make a standard error of sqrt(1/3). Fewer seeds decide nothing."""
    gain, error, judged = verdict([4.0, 5.0, 6.0], [3.0, 3.0, 3.0], 1)
    assert (gain, error, judged) == (2.0, pytest.approx(3**-0.5), "holds")
    assert verdict([4.0, 5.0, 6.0], [3.0, 3.0, 3.0], -1)[2] == "does not hold"
    assert verdict([4.0, 5.0, 6.0], [4.0, 4.0, 4.0], 1)[2] == "within noise"  # 1 < 2 x 0.577
    assert verdict([4.0], [3.0, 3.0, 3.0], 1) == (1.0, None, "1 of 3 seeds, not judged")
    assert verdict([4.0, 5.0, 6.0], [4.0, 3.0], 1) == (1.5, None, "2 of 3 seeds, not judged")


def test_claims_point_where_the_paper_points():
    """Where it prints figures of both sides, the better one's is the better figure: the higher, of FID the lower. Of ours less is better in two."""
    for c in claims.CLAIMS:
        if figures := re.findall(r"\d+\.\d+|\d{3}", c.paper):
            better, worse = map(float, figures)
            assert (better < worse) if "FID" in c.paper else (better > worse), c.text
    assert {c.measure for c in claims.CLAIMS if c.sign() < 0} == {"frechet", "contrast"}
    assert {c.measure for c in claims.CLAIMS if c.sign() > 0} == {"prompt_accuracy", "clip_score", "reward", "recall", "variation"}


def test_sweeps_are_of_equal_size():
    count = lambda table: sum(len(seeds) for _, seeds in stage1.TABLES[table].values())  # noqa: E731
    assert count("dmd2-sweep") - 1 == count("sweep")  # beside the defaults


def test_the_best_point_is_chosen_by_the_other_seeds():
    """By hand: the mean of the others is best in the middle, so 5 is taken, not 4. The last point is no choice: it is what the best is set beside."""
    assert at_best([[4, 5, 1], [9, 2, 6], [9, 1, 7]], -1) == [5, 2, 1]
    assert at_best([[9, 5, 1]], -1) == [5]
    assert at_best([[9, 5, 1], [8, 2, 3]], 1) == [9, 8]


def test_a_claim_may_ask_for_a_point_of_each_side():
    """Hand-made runs of all seeds: values seed by seed at the first, at the last and at the best point."""
    flags, points = cost.METHODS[claims.DMD2_TTUR2], run((1, 5.0, 0.1), (2, 3.0, 0.1), (3, 4.0, 0.1))
    measured = {cost.name(flags, s, 1000): points for s in stage1.SEEDS}
    assert [values(measured, claims.DMD2_TTUR2, "frechet", -1, p, 1000) for p in (0, -1, "best")] == [[5.0] * 3, [4.0] * 3, [3.0] * 3]
    assert values(measured, claims.DMD2_TTUR2, "frechet", -1, 0, 200) == []


def test_every_claim_names_rows_that_can_be_run():
    for c in claims.CLAIMS:
        for title, point in zip((c.better, c.worse), c.points):
            assert values({}, title, c.measure, c.sign(), point, 1000) == []
            assert point == -1 or title in claims.METHODS


def test_all_parts_run_all_that_the_claims_need(monkeypatch):
    """With nothing there, the rows that the parts would run give every claim both its sides, and SEEDS of each but the teacher's."""
    asked = {}
    monkeypatch.setattr(rows, "load", lambda path, **weights: {})
    monkeypatch.setattr(rows, "fill", lambda path, results, jobs, workers: asked.update(jobs))
    monkeypatch.setattr(stage1, "student", lambda *args: None)
    for train in claims.TRAIN.values():
        train(1000, 2)
    blank = defaultdict(float)
    measured = {n: [blank] * cost.POINTS if n.endswith("points") else blank for n in asked}
    for c, better, worse, *_ in claims.judge(measured, 1000):
        assert len(better) == 3 and len(worse) == 3, c


def test_share_of_the_baselines_cost():
    """By hand: the baseline is best at 300; Flash-DMD does as well first at 60, a fifth; what it never reaches is a bound."""
    baseline = run((100, 5.0, 0.7), (200, 4.0, 0.8), (300, 3.0, 0.8), (400, 3.5, 0.9))
    flash = run((30, 3.2, 0.9), (60, 2.9, 0.8), (90, 3.0, 0.9))
    assert share(flash, baseline, {"frechet": -1}) == (0.2, True)
    assert share(flash, baseline, {"prompt_accuracy": 1}) == (30 / 400, True)
    assert share(flash, baseline, {"frechet": -1, "prompt_accuracy": 1}) == (90 / 400, True)  # both at once: only at the end
    assert share(flash[:1], baseline, {"frechet": -1}, "passes") == (0.1, False)


def test_headline():
    """A line for each criterion, a value for each seed in every kind of cost; a baseline that is best at its end is named."""
    baseline = run((100, 4.0, 0.8), (200, 3.0, 0.8), (400, 3.5, 0.9))
    runs = {0: run((50, 3.0, 0.7), (100, 2.9, 0.9)), 1: run((50, 3.2, 0.9), (100, 3.1, 0.9)), 2: run((50, 1.0, 1.0))}
    lines = headline({"Flash-DMD, TTUR 1": runs, BASELINE: {0: baseline, 1: baseline[:2]}})  # seed 2 has no baseline yet
    assert lines[2:5] == [
        "| Flash-DMD, TTUR 1, seeds 0, 1 | Fréchet | 25, > 50 % | 25, > 50 % | 25, > 50 % |",
        "| Flash-DMD, TTUR 1, seeds 0, 1 | prompts right | 25, 50 % | 25, 50 % | 25, 50 % |",
        "| Flash-DMD, TTUR 1, seeds 0, 1 | both at once | 25, > 50 % | 25, > 50 % | 25, > 50 % |",
    ]
    assert "in prompts right (seed 0); Fréchet (seed 1):" in lines[-1]
    assert len(headline({})) == 4
    tuned = headline({"Flash-DMD, TTUR 1": runs, BASELINE: {0: baseline}, TUNED: {1: run((50, 3.1, 0.8), (100, 3.3, 0.9))}}, TUNED)
    assert tuned[0].startswith(f"| share of {TUNED}'s cost") and tuned[2].endswith("| Fréchet | 200 % | 200 % | 200 % |")
    for points in runs[0]:
        points["seconds"] = None  # a run that was paused
    assert headline({"Flash-DMD, TTUR 1": runs, BASELINE: {0: baseline, 1: baseline[:2]}})[2].endswith("| 25, > 50 % | ?, > 50 % |")


@pytest.mark.parametrize("preset, flags", [("dmd2", cost.DMD2), ("dmdr", siblings.DMDR), ("advdmd", siblings.ADVDMD)])
def test_rows_are_named_by_the_settings_of_their_preset(preset, flags, monkeypatch):
    """All that the preset changes is spelt out, the flags alone make the same run, and another value makes another name."""
    assert {f"--{s.replace('_', '-')}" for s in config.PRESETS[preset]} <= flags.keys() and "--preset" not in flags
    given = [str(f) for f in rows.flat(flags)]
    spelt, named = config.parse(given), config.parse(["--preset", preset, *given])
    assert vars(spelt) | {"preset": preset} == vars(named)
    names = [f.removeprefix("--").replace("-", "_") for f in flags]
    before = rows.key(stage1.spelt(names, preset), "--seed", 0)
    monkeypatch.setitem(config.PRESETS, preset, config.PRESETS[preset] | {"gan_weight": 0.77})
    assert rows.key(stage1.spelt(names, preset), "--seed", 0) != before


def test_every_row_has_a_name_of_its_own():
    names = [cost.name(f, 0, 1000) for f in claims.METHODS.values()]
    names += [stage2.name(f, 0, 1000) for f in (stage2.TABLE4 | stage2.TABLE7).values()]
    names += [stage1.name(f, 0, 1000) for table in ("main", "variants", "students", "sd3") for f, _ in stage1.TABLES[table].values()]
    assert len(set(names)) == len(names) and not any("--preset" in n for n in names)


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
    first = {"--iterations 400 a": {"seconds_per_loop": 9.0}, "teacher": {}, "teacher_crc32": 1, "--iterations 400 b": {}}
    others = {"--iterations 400 a": {}, "--iterations 2000 c": [{"seconds": 9.0}, {"seconds": 3600.0}], "--iterations 400 d": {"minutes": 60.0}}
    assert claims.hours(first, others).startswith("3.0 hours of training in the 3 of 4 rows")
