"""Flash-DMD in the plane: four questions where the true score is known (lab/mixture.py), with twenty seeds.

python -m lab.plane            the runs that are missing in results/plane.json, then results/plane.md
python -m lab.plane --quick    one seed: docs/plane.png and docs/plane.gif
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
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
RATES = {"slow": (3e-4, 1e-3), "middle": (1e-3, 3e-3), "fast": (3e-3, 3e-3)}  # of G, of the score estimator
TTURS = (1, 2, 5)
PULLED = {True: "EMA pull", False: "no pull"}
BASE = Settings()
STAGE2 = replace(BASE, stage=2, updates=200)


def pace(rate, ttur, pulled):
    """The title of a run of the first question."""
    return f"{rate} rates, TTUR {ttur}, {PULLED[pulled]}"


def paced(rate, ttur, pulled):
    lr, fake_lr = RATES[rate]
    return replace(BASE, lr=lr, fake_lr=fake_lr, ttur=ttur, ema=BASE.ema if pulled else 1.0)


START = "undistilled: the teacher in four steps"
STANDARD = pace("middle", 1, True)
STRONG = "the standard run with λ = 0.9"
HIGH_STEPS = "DM at the high-noise steps only"
HIGH, LOW = "renoise high, 0.5 to 0.98", "renoise low, 0.02 to 0.5"
JOINT, ALONE = "joint, 5:1", "RL alone"
RUNS = {
    **{pace(*p): paced(*p) for p in [(rate, ttur, pulled) for rate in RATES for ttur in TTURS for pulled in PULLED]},
    STRONG: replace(BASE, ema=0.9),
    HIGH_STEPS: replace(BASE, dm_steps="high"),
    HIGH: replace(BASE, renoise=(0.5, 0.98)),
    LOW: replace(BASE, renoise=(0.02, 0.5)),
    JOINT: STAGE2,
    ALONE: replace(STAGE2, rl_ratio=0),
}
PICTURED = (STANDARD, STRONG, HIGH_STEPS, HIGH, LOW, ALONE, JOINT)

PULL, RL = "EMA pull and TTUR (Fig. 5, 6)", "Joint RL (3.4, Table 4)"
CLAIMS = [  # question, claim, better run, worse run, measure, +1 where more of it is better
    *(
        (PULL, f"{r}, TTUR {n}: the pull helps", pace(r, n, True), pace(r, n, False), "kl", -1)
        for r in RATES
        for n in TTURS
    ),
    *(
        (PULL, f"{r}, {PULLED[p]}: TTUR 5 beats 1", pace(r, 5, p), pace(r, 1, p), "kl", -1)
        for r in RATES
        for p in PULLED
    ),
    ("DM steps (3.3)", "the high-noise steps alone beat all", HIGH_STEPS, STANDARD, "kl", -1),
    ("Renoising (3.1)", "the whole range beats high noise alone", STANDARD, HIGH, "kl", -1),
    ("Renoising (3.1)", "the whole range beats low noise alone", STANDARD, LOW, "kl", -1),
    (RL, "joint stays nearer to the teacher than RL alone", JOINT, ALONE, "kl", -1),
    (RL, "joint has more of the reward that RL sees", JOINT, ALONE, "reward", 1),
    (RL, "joint has more of the second reward", JOINT, ALONE, "second_reward", 1),
    (RL, "joint has more of the second reward than stage 1", JOINT, STANDARD, "second_reward", 1),
    (RL, "RL alone has more of it than stage 1", ALONE, STANDARD, "second_reward", 1),
]


def verdict(better, worse, sign):
    """Values of both sides, seed by seed -> (mean paired difference towards the claim, standard error, verdict).

    The rule: the sign of the mean decides where it is beyond two standard errors; fewer than LEAST seeds decide
    nothing. A seed's two runs share their first networks, and the differences of seeds are independent.
    """
    gains = [sign * (b - w) for b, w in zip(better, worse)]
    if len(gains) < LEAST:
        return None, None, f"{len(gains)} seeds, not decided"
    gain = mean(gains)
    error = stdev(gains) / len(gains) ** 0.5
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def degraded(row):
    """Fig. 5's instability: whether a run's KL ends above twice its lowest on the way."""
    return row["way"][-1] > 2 * min(row["way"])


# ------------------------------------------------------------------------------------------------ the runs


def measure(title, seeds):
    """Trains a run of a group of seeds -> what is measured, one dict per seed."""
    start = undistilled(seeds)
    if title == START:
        return measured(start)
    settings = RUNS[title]
    ways = []  # six times: the KL of every seed

    def see(trainer, done):
        if done and done % (settings.updates // 6) == 0:
            fresh, own = (student(trainer.G, n, seed)[0] for n, seed in ((100, 3), (500, 4)))
            ways.append([row["kl"][0] for row in levels(trainer.fake, fresh, own, LEVELS[:1])])

    if settings.stage == 2:
        start = train(start, BASE, seeds[0])
    return [{**row, "way": way} for row, way in zip(measured(train(start, settings, seeds[0], see)), zip(*ways))]


def name(title, seeds):
    """What a run is kept under: its settings, those of the run that stage 2 starts from, its seeds."""
    return json.dumps([asdict(RUNS[title]) if title in RUNS else START, asdict(BASE), seeds])


def run(groups, jobs, path):
    """Trains what is missing in `path`, and keeps each run when it ends -> {title: {seed: what was measured}}."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    wanted = [(title, group) for title in (START, *RUNS) for group in groups]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(measure, *each): name(*each) for each in wanted if name(*each) not in kept}
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
    lines = [("question", "claim", "measure", "claimed better", "worse", "difference", "verdict")]
    for question, text, better, worse, measured, sign in CLAIMS:
        sides = [column(found[title], measured) for title in (better, worse)]
        gain, error, decided = verdict(*sides, sign)
        difference = "" if gain is None else f"{gain:.3f} ± {error:.3f}"
        lines.append((question, text, measured.replace("_", " "), *map(across, sides), difference, decided))
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
    lines = [("t", "KL", "its standard error", "its bias", "score error", "its noise")]
    for i, t in enumerate(LEVELS):
        at = {
            m: [row[m][i] for row in rows.values()] for m in ("kl", "kl_error", "kl_bias", "score_error", "score_noise")
        }
        own = [f"{mean(at[m]):.4f}" for m in ("kl_error", "kl_bias", "score_noise")]
        lines.append((str(t), across(at["kl"]), *own[:2], across(at["score_error"]), own[2]))
    return table(*lines)


def page(found):
    """results/plane.md."""
    rates = "; ".join(f"{rate}: {lr:g} and {fake_lr:g}" for rate, (lr, fake_lr) in RATES.items())
    parts = [
        INTRODUCTION,
        verdicts(found),
        RULE.format(len(found[STANDARD]), rates),
        "## Every run",
        ends(found),
        MEASURES,
    ]
    text = [part if isinstance(part, list) or part.startswith("#") else pages.wrapped(part) for part in parts]
    return pages.joined(
        [*text, "## The standard run at every noise level", by_level(found[STANDARD]), pages.wrapped(NOTES)]
    )


INTRODUCTION = """# The method in the plane

`python -m lab.plane` trains what is missing and writes this page; `--quick` draws the picture from one seed. The world
is a Gaussian mixture of three classes with three modes each: its score at every noise level is known
([lab/mixture.py](../lab/mixture.py)). The functions of `dmd.py`, `score_estimator.py`, `diffusion.py` and
`latent_reward.py` run on it as they are. There is no Pixel-GAN. These verdicts stand beside those of the image toy
([claims.md](claims.md)) and overturn none of them: two dimensions and small MLPs say what the equations do, not what
they do to pictures.

![students, and their errors at every noise level](../docs/plane.png)
"""

RULE = f"""
The rule was fixed before the runs, and settings were chosen with other seeds: the mean over {{}} seeds of the paired
differences decides where it is beyond two standard errors, and fewer than {LEAST} seeds decide nothing. With no effect,
about one verdict in twenty passes this bar by chance; the rows are not corrected for their number.

The standard run is "{STANDARD}", λ = {BASE.ema:g}. Rates of G and of the score estimator, falling to zero: {{}}. Stage
1 has {BASE.updates} updates of G at any TTUR, stage 2 {STAGE2.updates} preference updates from the standard run.
"""

MEASURES = f"""
Means over seeds with their standard errors. "KL" is KL(student || mixture) in nats, of the student noised to t =
{LEVELS[0]}, as are the verdicts'; less is better. "Score error" is the mean squared error of the score estimator's ε̂
there, against the student's own score. "Modes covered" have at least half the points that they should; "strays" are
further than four standard deviations from every mode of their class. The reward that RL sees is how far points lie
towards the outermost mode of their class; the second reward, which no update sees, is whether they lie in it.
"Degraded" runs end with more than twice the lowest KL on their way, measured six times.
"""

NOTES = f"""
The noised student is a Gaussian mixture over {3 * CENTRES:,} of its samples, so that its density and its score are
estimates. Their own errors, in one run: the standard error of a KL over the points it is measured at; the bias of the
kernels, from half of the samples; and the part of a score error that is the kernels' noise.

One world, one size of network, one budget. Seeds differ in first weights and in all noise, but for the order of the
student steps, which the seeds of a group share. Where DM trains the high-noise steps alone, the last step has no loss
here; in the paper it has Pixel-GAN's.
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
        return pictures({title: RUNS[title] for title in PICTURED}, undistilled((0,)))
    groups = [tuple(args.seeds[i : i + GROUP]) for i in range(0, len(args.seeds), GROUP)]
    text = page(run(groups, args.jobs, args.out / "plane.json"))
    (args.out / "plane.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
