"""Flash-DMD in the plane: four questions where the true score is known (lab/mixture.py), with twenty seeds.

    python -m lab.plane            the runs that are missing in results/plane.json, then results/plane.md
    python -m lab.plane --quick    one seed: docs/plane.png and docs/plane.gif
    python -m lab.plane --print    results/plane.md from the runs that are there

An interrupted call goes on: a run of a group of seeds is kept under its settings.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from engine.flags import at_least
from lab import pages
from lab.mixture import Game, Player, Settings, play
from lab.plane_student import LEVELS, MEASURED, draw, levels, measured, student

RESULTS = Path("results/plane.json")
PAGE = Path("results/plane.md")
SEEDS = 20
GROUP = 5  # seeds that are played at once
LEAST = 10  # seeds that decide
POINTS = 6  # of a run's way where its KL is measured
RATES = {"slow": (3e-4, 1e-3), "middle": (1e-3, 3e-3), "fast": (3e-3, 3e-3)}  # of G, of the score estimator
START = "undistilled: the teacher in four steps"
BASE = Settings()
STAGE2 = Settings(updates=0, rl_updates=200)


def paced(rate, ttur, pulled):
    lr, fake_lr = RATES[rate]
    return Settings(lr=lr, fake_lr=fake_lr, ttur=ttur, ema=BASE.ema if pulled else 1.0)


def pace_title(rate, ttur, pulled):
    return f"{rate} rates, TTUR {ttur}, {'EMA pull' if pulled else 'no pull'}"


PACES = [(rate, ttur, pulled) for rate in RATES for ttur in (1, 2, 5) for pulled in (True, False)]
STANDARD = pace_title("middle", 1, True)
HIGH_STEPS = "DM at the high-noise steps only"
HIGH, LOW = "renoise high, 0.5 to 0.98", "renoise low, 0.02 to 0.5"
GUIDED = "guidance, w = 2"
JOINT, ALONE = "joint, 5:1", "RL alone"
RUNS = {pace_title(*pace): paced(*pace) for pace in PACES} | {
    HIGH_STEPS: replace(BASE, dm_steps="high"),
    HIGH: replace(BASE, renoise=(0.5, 0.98)),
    LOW: replace(BASE, renoise=(0.02, 0.5)),
    GUIDED: replace(BASE, guidance=2.0),
    JOINT: STAGE2,
    ALONE: replace(STAGE2, rl_only=True),
}
PICTURED = (pace_title("fast", 1, False), HIGH_STEPS, HIGH, LOW, ALONE, JOINT)


# ------------------------------------------------------------------------------------------- the questions


@dataclass
class Claim:
    """That `better` has more of a measure than `worse`, or less where the sign is -1: on the average over seeds."""

    question: str
    text: str
    better: str
    worse: str
    measure: str = "kl"
    sign: int = -1


PULL, RL = "EMA pull and TTUR (Fig. 5, 6)", "Joint RL (3.4, Table 4)"
WITH = {True: "with the pull", False: "without it"}
CLAIMS = [
    *(
        Claim(PULL, f"{r} rates, TTUR {ttur}: the pull helps", pace_title(r, ttur, True), pace_title(r, ttur, False))
        for r in RATES
        for ttur in (1, 2, 5)
    ),
    *(
        Claim(PULL, f"{r} rates, {WITH[p]}: TTUR 5 beats TTUR 1", pace_title(r, 5, p), pace_title(r, 1, p))
        for r in RATES
        for p in (True, False)
    ),
    Claim("DM steps (3.3)", "the high-noise steps alone beat all", HIGH_STEPS, STANDARD),
    Claim("Renoising (3.1)", "the whole range beats high noise alone", STANDARD, HIGH),
    Claim("Renoising (3.1)", "the whole range beats low noise alone", STANDARD, LOW),
    Claim(RL, "joint stays nearer to the teacher than RL alone", JOINT, ALONE),
    Claim(RL, "joint has more of the reward that RL sees", JOINT, ALONE, "reward", 1),
    Claim(RL, "joint has more of the second reward", JOINT, ALONE, "second_reward", 1),
    Claim(RL, "joint has more of the second reward than stage 1", JOINT, STANDARD, "second_reward", 1),
    Claim(RL, "RL alone has more of it than stage 1", ALONE, STANDARD, "second_reward", 1),
]


def value(run, measure):
    """A number of a run; of what is measured at every noise level, that at the lowest."""
    return run[measure][0] if isinstance(run[measure], list) else run[measure]


def verdict(better, worse, sign):
    """Values of both sides, seed by seed -> (mean paired difference towards the claim, standard error, verdict).

    The rule: the sign of the mean decides where it is beyond two standard errors; fewer than LEAST seeds decide
    nothing. A seed's two runs share their first networks, and the differences of seeds are independent.
    """
    gains = [sign * (b - w) for b, w in zip(better, worse)]
    if len(gains) < LEAST:
        return None, None, f"{len(gains)} of {SEEDS} seeds, not decided"
    gain = mean(gains)
    error = stdev(gains) / len(gains) ** 0.5
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def degraded(run):
    """Fig. 5's instability: whether a run's KL ends above twice its lowest on the way."""
    return run["way"][-1] > 2 * min(run["way"])


# ------------------------------------------------------------------------------------------------ the runs


def name(title, group):
    """What a row is kept under: all its settings, its own and those of the run that it starts from, and its seeds."""
    settings = RUNS.get(title)
    return f"{asdict(settings) if settings else START} from {asdict(BASE)}, group {group} of {GROUP}"


def first(group):
    """The networks of a group of seeds, as the teacher."""
    return Player(range(group * GROUP, (group + 1) * GROUP))


@cache
def stage1(group):
    return play(first(group), BASE, group)


def measure(title, group):
    """-> what is measured of a row, one dict per seed of the group."""
    if title == START:
        return measured(Game(first(group), first(group), BASE, group))
    settings = RUNS[title]
    ways = []

    def see(game, update):
        if update and update % ((settings.updates or settings.rl_updates) // POINTS) == 0:
            points, centres = student(game.G, 300, 3), student(game.G, 1500, 4)
            ways.append([run[0]["kl"] for run in levels(game, points, centres, LEVELS[:1])])

    game = play(stage1(group) if settings.rl_updates else first(group), settings, group, see)
    return [run | {"way": list(way)} for run, way in zip(measured(game), zip(*ways))]


def rounded(x):
    if isinstance(x, float):
        return float(f"{x:.5g}")
    return [rounded(v) for v in x] if isinstance(x, list) else {k: rounded(v) for k, v in x.items()}


def run(jobs):
    """Plays what is missing: a group of seeds stays in one process, so that its standard run is played once."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [(g, title) for g in range(SEEDS // GROUP) for title in [START, *RUNS] if name(title, g) not in kept]
    pools = [ProcessPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in range(jobs)]
    waiting = {pools[g % jobs].submit(measure, title, g): name(title, g) for g, title in missing}
    for done in tqdm(as_completed(waiting), total=len(waiting), desc="runs", disable=not waiting):
        kept[waiting[done]] = [rounded(row) for row in done.result()]
        aside = RESULTS.with_suffix(".part")
        aside.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}\n")
        aside.rename(RESULTS)
    for pool in pools:
        pool.shutdown()


def load():
    """{title: {seed: what was measured}}, of the rows that are there."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {}
    for title in [START, *RUNS]:
        rows = {g: kept.get(name(title, g), []) for g in range(SEEDS // GROUP)}
        found[title] = {g * GROUP + i: row for g, group in rows.items() for i, row in enumerate(group)}
    return found


# ------------------------------------------------------------------------------------------------ the page


def assess(found):
    """-> for each of CLAIMS (claim, better side, worse side, gain, error, verdict), seeds that have both sides."""
    assessed = []
    for claim in CLAIMS:
        seeds = sorted(found[claim.better].keys() & found[claim.worse].keys())
        sides = [[value(found[t][s], claim.measure) for s in seeds] for t in (claim.better, claim.worse)]
        assessed.append((claim, *sides, *verdict(*sides, claim.sign)))
    return assessed


def verdicts(assessed):
    lines = ["| question | claim | measure | claimed better, worse | difference | verdict |", "| --- |" + " --- |" * 5]
    for claim, better, worse, gain, error, decided in assessed:
        sides = f"{mean(better):.3f}, {mean(worse):.3f}" if better else ""
        difference = "" if gain is None else f"{gain:.3f} ± {error:.3f}"
        measure = claim.measure.replace("_", " ")
        lines.append(f"| {claim.question} | {claim.text} | {measure} | {sides} | {difference} | {decided} |")
    return lines


def across(values, digits=3):
    """A mean over seeds and its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def ends(found):
    """A line for every run: what it ends with, over seeds."""
    columns = {"kl": "KL", "score_error": "score error", "coverage": "modes covered", "strays": "strays"}
    columns |= {"reward": "reward", "second_reward": "second reward"}
    lines = [f"| run | seeds | {' | '.join(columns.values())} | degraded |", "| --- |" + " --- |" * 8]
    for title, runs in found.items():
        if runs:
            cells = [across([value(run, m) for run in runs.values()]) for m in columns]
            worse = f"{sum(map(degraded, runs.values()))} of {len(runs)}" if title in RUNS else ""
            lines.append(f"| {title} | {len(runs)} | {' | '.join(cells)} | {worse} |")
    return lines


def by_level(found, titles, measure, own_error):
    """A line for every noise level: the measure of some runs over seeds, and its own error in one run."""
    lines = [f"| t | {' | '.join(titles)} | {own_error} |", "| --- |" + " --- |" * (len(titles) + 1)]
    runs = [list(found[title].values()) for title in titles]
    for i, t in enumerate(LEVELS):
        cells = [across([run[measure][i] for run in each]) if each else "" for each in runs]
        own = [mean(abs(run[e][i]) for run in runs[0]) for e in own_error.split(", ")] if runs[0] else []
        lines.append(f"| {t} | {' | '.join(cells)} | {', '.join(f'{e:.4f}' for e in own)} |")
    return lines


SHOWN = (STANDARD, pace_title("middle", 1, False), HIGH_STEPS, HIGH, LOW, JOINT, ALONE)


def page():
    """results/plane.md, from the runs that are there."""
    found = load()
    seeds = set.intersection(*map(set, found.values()))
    rates = "; ".join(f"{rate}: {lr:g} and {fake_lr:g}" for rate, (lr, fake_lr) in RATES.items())
    counts = f"{len(seeds)} of {SEEDS} seeds have every run. The standard run is: {STANDARD}. Rates of G and of the "
    counts += f"score estimator, falling to zero: {rates}. A run of stage 1 has {BASE.updates} updates of G at any "
    counts += f"TTUR, one of stage 2 {STAGE2.rl_updates} preference updates from the standard run."
    return pages.joined(
        [
            INTRODUCTION,
            pages.wrapped(counts),
            "## Verdicts",
            verdicts(assess(found)),
            RULE,
            "## Every run",
            ends(found),
            MEASURES,
            "## KL at every noise level",
            by_level(found, SHOWN, "kl", "kl_error, kl_bias"),
            "## The score estimator's error at every noise level",
            by_level(found, SHOWN, "score_error", "score_noise"),
            NOTES,
        ]
    )


INTRODUCTION = """
# The method in the plane

`python -m lab.plane` runs what is missing and writes this page; `--print` writes it from the runs that are there;
`--quick` draws the pictures from one seed. The world is a Gaussian mixture of three classes with three modes each: its
score at every noise level is known ([lab/mixture.py](../lab/mixture.py)). The functions of `dmd.py`,
`score_estimator.py`, `diffusion.py` and `latent_reward.py` run on it as they are. There is no Pixel-GAN.

These verdicts stand beside those of the image toy ([claims.md](claims.md)) and overturn none of them: two dimensions
and small MLPs say what the equations do, not what they do to pictures.

![students, and their errors at every noise level](../docs/plane.png)
"""

RULE = f"""
The rule was fixed before the runs: the mean over seeds of the paired differences decides where it is beyond two
standard errors, and fewer than {LEAST} seeds decide nothing. With no effect, about one verdict in twenty passes this
bar by chance; the rows are not corrected for their number.
"""

MEASURES = f"""
Means over seeds with their standard errors. "KL" is KL(student || mixture) in nats, of the student noised to t =
{LEVELS[0]}, as are the verdicts'; less is better. "Score error" is the mean squared error of the score estimator's ε̂
there, against the student's own score. "Modes covered" have at least half the points that they should; "strays" are
further than four standard deviations from every mode of their class. "Degraded" runs end with more than twice the
lowest KL on their way, measured at {POINTS} points.
"""

NOTES = f"""
The noised student is a Gaussian mixture over {MEASURED:,} of its samples, so that its density and its score are
estimates. The last columns have the standard run's own errors: the standard error of a KL over the points it is
measured at; the bias of the kernels, from half of the samples; and the part of a score error that is the kernels'
noise.

One world, one size of network, one budget. Seeds differ in first weights and in all noise, but for the order of the
student steps, which the seeds of a group share. Where DM trains the high-noise steps alone, the last step has no loss
here; in the paper it has Pixel-GAN's.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="draw docs/plane.png and docs/plane.gif from one seed")
    parser.add_argument("--print", action="store_true", help="write the page from the runs that are there")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes, of one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        return draw({STANDARD: BASE} | {title: RUNS[title] for title in PICTURED}, Player([0]))
    if not args.print:
        run(args.jobs)
    PAGE.write_text(page())
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
