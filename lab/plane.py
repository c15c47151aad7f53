"""Flash-DMD in the plane: four questions where the true score is known (lab/mixture.py), with twenty seeds.

python -m lab.plane            the runs that are missing in results/plane.json, then results/plane.md
python -m lab.plane --quick    one seed: docs/plane.png and docs/plane.gif
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from engine.flags import at_least
from lab import pages
from lab.mixture import Settings, train, undistilled
from lab.plane_student import CENTRES, LEVELS, levels, measured, pictures, student

GROUP = 10  # seeds that are trained at once
LEAST = 10  # seeds that decide
RATES = {"slow": (3e-4, 1e-3), "middle": (1e-3, 5e-3), "fast": (3e-3, 5e-3)}  # of G, of the score estimator
PULL = {True: "EMA pull", False: "no pull"}
BASE = Settings()
STAGE2 = replace(BASE, stage=2, updates=240)


def pace(rate, ttur, pulled):
    """The title of a run of the first question."""
    return f"{rate} rates, TTUR {ttur}, {PULL[pulled]}"


PACES = [(rate, ttur, pulled) for rate in RATES for ttur in (1, 2, 5) for pulled in PULL]
START, STANDARD, STRONG = "undistilled: the teacher in four steps", pace("middle", 1, True), "standard, λ = 0.9"
HIGH_STEPS, HIGH, LOW = "DM at the high-noise steps only", "renoise high, 0.5 to 0.98", "renoise low, 0.02 to 0.5"
JOINT, ALONE = "joint, 5:1", "RL alone"
RUNS = {
    pace(rate, ttur, pulled): replace(
        BASE, lr=RATES[rate][0], fake_lr=RATES[rate][1], ttur=ttur, ema=BASE.ema if pulled else 1.0
    )
    for rate, ttur, pulled in PACES
}
RUNS[STRONG] = replace(BASE, ema=0.9)
RUNS[HIGH_STEPS] = replace(BASE, dm_steps="high")
RUNS[HIGH] = replace(BASE, renoise=(0.5, 0.98))
RUNS[LOW] = replace(BASE, renoise=(0.02, 0.5))
RUNS[JOINT] = STAGE2
RUNS[ALONE] = replace(STAGE2, rl_ratio=0)
PICTURED_SEED = 100  # in no verdict
PICTURED = (STANDARD, STRONG, HIGH_STEPS, HIGH, LOW, ALONE, JOINT)

CLAIMS = [  # claim, better run, worse run, measure, +1 where more of it is better
    *((f"{r}, TTUR {n}: the pull helps", pace(r, n, True), pace(r, n, False), "kl", -1) for r, n, p in PACES if p),
    *((f"{r}, {PULL[p]}: TTUR 5 beats 1", pace(r, 5, p), pace(r, 1, p), "kl", -1) for r, n, p in PACES if n == 1),
    ("DM at the high-noise steps alone beats all steps", HIGH_STEPS, STANDARD, "kl", -1),
    ("renoising over the whole range beats high noise alone", STANDARD, HIGH, "kl", -1),
    ("renoising over the whole range beats low noise alone", STANDARD, LOW, "kl", -1),
    ("joint RL stays nearer to the teacher than RL alone", JOINT, ALONE, "kl", -1),
    ("joint RL has more of the reward that RL sees", JOINT, ALONE, "reward", 1),
    ("joint RL has more of the second reward", JOINT, ALONE, "second_reward", 1),
    ("joint RL has more of the second reward than stage 1", JOINT, STANDARD, "second_reward", 1),
    ("RL alone has more of it than stage 1", ALONE, STANDARD, "second_reward", 1),
]


def verdict(better, worse, sign):
    """Values of both sides, seed by seed -> (mean paired difference towards the claim, standard error, verdict).

    The rule: the sign of the mean decides where it is beyond two standard errors; fewer than LEAST seeds decide
    nothing. A seed's two runs share their first networks, and the differences of seeds are independent.
    """
    gains = [sign * (b - w) for b, w in zip(better, worse)]
    if len(gains) < LEAST:
        return None, None, f"{len(gains)} seeds, not decided"
    gain, error = mean(gains), stdev(gains) / len(gains) ** 0.5
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def degraded(row):
    """Fig. 5's instability: whether a run's KL ends above twice its lowest on the way."""
    return row["way"][-1] > 2 * min(row["way"])


# ------------------------------------------------------------------------------------------------ the runs


def measure(settings, base, seeds, centres):
    """Trains a run of a group of seeds (None: the undistilled teacher) -> what is measured, one dict per seed.

    Stage 2 starts from a run of the settings `base`. `centres`: samples of each class that stand for the density.
    """
    start = undistilled(seeds)
    if settings is None:
        return measured(start, centres)
    ways = []  # six times: the KL of every seed

    def see(trainer, done):
        if done and done % (settings.updates // 6) == 0:
            fresh, own = (student(trainer.G, n, seed)[0] for n, seed in ((100, 3), (500, 4)))
            ways.append([row["kl"][0] for row in levels(trainer.fake, fresh, own, LEVELS[:1])])

    if settings.stage == 2:
        start = train(start, base, seeds[0])
    rows = measured(train(start, settings, seeds[0], see), centres)
    return [{**row, "way": way} for row, way in zip(rows, zip(*ways))]


def name(title, seeds):
    """What a run is kept under: its settings, those of the run that stage 2 starts from, its seeds."""
    return json.dumps([asdict(RUNS[title]) if title in RUNS else START, asdict(BASE), seeds])


def run(groups, jobs, path):
    """Trains what is missing in `path`, and keeps each run when it ends -> {title: {seed: what was measured}}."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    wanted = [(title, group) for title in (START, *RUNS) for group in groups]
    spawned = get_context("spawn")  # autograd's threads do not survive a fork
    with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
        waiting = {
            pool.submit(measure, RUNS.get(title), BASE, seeds, CENTRES): name(title, seeds)
            for title, seeds in wanted
            if name(title, seeds) not in kept
        }
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="runs", disable=not waiting):
            kept[waiting[done]] = done.result()
            aside = path.with_suffix(".part")
            aside.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}\n")
            aside.rename(path)
    found = {title: {} for title, _ in wanted}
    for title, group in wanted:
        found[title].update(zip(group, kept[name(title, group)]))
    return found


# ------------------------------------------------------------------------------------------------ the page


def column(rows, measure):
    """A number of each run; of what is measured at every noise level, that at the lowest."""
    return [row[measure][0] if isinstance(row[measure], list) else row[measure] for row in rows.values()]


def across(values):
    """A mean over seeds and its standard error."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


def table(*lines):
    """The first line has the headings."""
    return ["| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]


def verdicts(found):
    lines = [("claim", "measure", "claimed better", "worse", "difference", "verdict")]
    for text, better, worse, of, sign in CLAIMS:
        sides = [column(found[title], of) for title in (better, worse)]
        gain, error, decided = verdict(*sides, sign)
        difference = "" if gain is None else f"{gain:.3f} ± {error:.3f}"
        lines.append((text, of.replace("_", " "), *map(across, sides), difference, decided))
    return table(*lines)


def ends(found):
    """What every run ends with."""
    measures = ("kl", "score_error", "coverage", "strays", "reward", "second_reward")
    lines = [("run", "KL", "score error", "modes covered", "strays", "reward", "second reward", "degraded")]
    for title, rows in found.items():
        worse = f"{sum(map(degraded, rows.values()))} of {len(rows)}" if title in RUNS else ""
        lines.append((title, *(across(column(rows, m)) for m in measures), worse))
    return table(*lines)


def by_level(rows):
    """One run's KL and score error at every noise level, each with the errors of one estimate."""
    lines = [("t", "KL", "score error", "standard error of a KL", "its bias", "noise of a score error")]
    for i, t in enumerate(LEVELS):
        cells = [across([row[m][i] for row in rows.values()]) for m in ("kl", "score_error")]
        own = [f"{mean(row[m][i] for row in rows.values()):.4f}" for m in ("kl_error", "kl_bias", "score_noise")]
        lines.append((str(t), *cells, *own))
    return table(*lines)


def page(found):
    """results/plane.md."""
    rates = "; ".join(f"{rate}: {lr:g} and {fake_lr:g}" for rate, (lr, fake_lr) in RATES.items())
    rule = pages.wrapped(RULE.format(len(found[STANDARD]), rates))
    unstable = pages.wrapped(instability(found))
    parts = [INTRODUCTION, verdicts(found), unstable, rule, "## Every run", ends(found), pages.wrapped(MEASURES)]
    parts += ["## The standard run at every noise level", by_level(found[STANDARD]), pages.wrapped(NOTES)]
    return pages.joined(parts)


def instability(found):
    """Fig. 5's question: in which runs of the first question KL rises again."""
    worse = {pace(*each): sum(map(degraded, found[pace(*each)].values())) for each in PACES}
    named = [f"{n} at {title}" for title, n in worse.items() if n]
    told = f"in {'; in '.join(named)}; in none of the other {len(worse) - len(named)}" if named else "in none"
    rises = 'KL rises again ("degraded", below)'
    return f"Is Fig. 5's instability there, at which rates? Of {len(found[STANDARD])} runs each {rises} {told}."


INTRODUCTION = """# The method in the plane

`python -m lab.plane` trains what is missing and writes this page; `--quick` draws the picture from one seed. The world
is a Gaussian mixture of three classes with three modes each: its score at every noise level is known
([lab/mixture.py](../lab/mixture.py)). The functions of `dmd.py`, `score_estimator.py`, `diffusion.py` and
`latent_reward.py` run on it as they are; there is no Pixel-GAN. These verdicts stand beside those of the image toy
([claims.md](claims.md)) and overturn none of them: they say what the equations do, not what they do to pictures.

![students, and their errors at every noise level](../docs/plane.png)

Colours are the classes, the shading is the mixture's density, dots are a student's samples; arrows are s_real - s_fake,
stars the modes that RL rewards. A curve ends where a KL is below its own error.

## Verdicts
"""

RULE = f"""
The rule was fixed before the runs, and settings were chosen with other seeds: the mean over {{}} seeds of the paired
differences decides where it is beyond two standard errors; fewer than {LEAST} seeds decide nothing. With no effect,
about one verdict in twenty passes this bar by chance. The standard run is "{STANDARD}", λ = {BASE.ema:g}. Rates of G
and of the score estimator, falling to zero: {{}}. Stage 1 has {BASE.updates} updates of G at any TTUR, stage 2
{STAGE2.updates} preference updates from the standard run.
"""

MEASURES = f"""
Means over seeds with their standard errors. "KL" is KL(student || mixture) in nats, of the student noised to t =
{LEVELS[0]}, as are the verdicts'. "Score error" is the mean squared error of the score estimator's ε̂ there, against
the student's own score. "Modes covered" have at least half the points that they should; "strays" are further than four
standard deviations from every mode of their class. The reward that RL sees is how far points lie towards the outermost
mode of their class; the second reward, which no update sees, is whether they lie in it. "Degraded" runs end with more
than twice the lowest KL on their way, measured six times.
"""

NOTES = f"""
The noised student is a Gaussian mixture over {3 * CENTRES:,} of its samples, so that its density and its score are
estimates. The last columns are the errors of one run's: the standard error of a KL over the points it is measured at;
the bias of the kernels, from half of the samples; the part of a score error that is the kernels' noise. Seeds differ in
first weights and in all noise, but for the order of the student steps. Where DM trains the high-noise steps alone, the
last step has no loss here; in the paper it has Pixel-GAN's.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="draw docs/plane.png and docs/plane.gif from one seed")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)), help="of the runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of plane.json and plane.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        return pictures({title: RUNS[title] for title in PICTURED}, undistilled((PICTURED_SEED,)))
    groups = [tuple(args.seeds[i : i + GROUP]) for i in range(0, len(args.seeds), GROUP)]
    text = page(run(groups, args.jobs, args.out / "plane.json"))
    (args.out / "plane.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
