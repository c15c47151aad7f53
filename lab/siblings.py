"""DMDR and AdvDMD on the toy world: what each of their parts does to quality, reward and recall.

    python -m lab.siblings          the missing rows of results/siblings.json, then results/siblings.md and its plot
    python -m lab.siblings --print  page and plot from the rows that are there

Every run is evaluated at five points of its way, as in lab/cost.py. AdvDMD is our reconstruction of the method, and
DMDR our reconstruction from its public schedules.
"""

from pathlib import Path

from lab import cost, pages, rows, stage1, stage2
from lab.cost import BASELINE
from lab.pages import each, errors, figure, frechet, right
from lab.rows import SEEDS
from lab.stage1 import SETTINGS, spelt

RESULTS = Path("results/siblings.json")
OWN = (
    *("fake_lora", "lora_layers", "dynamic", "real_scale", "dm_input"),
    *("rl", "reward_start", "reward_weight", "reward_margin"),
)
DMDR = spelt((*SETTINGS, "method", *OWN), "dmdr")
DMDR |= {"--iterations": 1000}  # G moves in every fifth loop: 100 updates of cold start, 100 with reward
COLD = 2  # the first of its five points that the cold start, 500 loops, is behind
ADVDMD = spelt((*SETTINGS, "method", "critic_weight", "candidates", "rl_gate", "rl_after"), "advdmd")
ADVDMD |= {"--iterations": 400, "--ttur": 2, "--rl-after": 60}  # 60 updates of G before RL, 140 with it
PAID = "DMDR"
UNPAID = "DMDR, no reward"
STATIC = "DMDR, no reward, no dynamic training"
ONLINE = "AdvDMD"
UNREWARDED = "AdvDMD, no RL"
FROZEN = "AdvDMD, frozen reward"
METHODS = {
    PAID: DMDR,
    UNPAID: DMDR | {"--reward-weight": 0},
    STATIC: DMDR | {"--reward-weight": 0, "--dynamic": 0},
    ONLINE: ADVDMD,
    UNREWARDED: ADVDMD | {"--rl-after": 10**6},
    FROZEN: ADVDMD | {"--judge": UNREWARDED},  # the discriminator at the end of that row's run
}
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast", "rl_open")


def frozen_reward_run(seed, num, threads):
    """The folder of the UNREWARDED run of a seed; trained here where it is not there."""
    out = rows.folder(cost.name(METHODS[UNREWARDED], seed, num))
    if not (out / f"metrics-{ADVDMD['--iterations']}.json").exists():
        cost.run(METHODS[UNREWARDED], out, seed, num, threads)
    return out


def measure(title, seed, num, threads):
    """-> metrics at five points of a row's run."""
    flags = METHODS[title]
    if title == UNREWARDED:  # its run stays: it is FROZEN's reward
        return cost.run(flags, rows.folder(cost.name(flags, seed, num)), seed, num, threads)
    if title == FROZEN:
        flags = flags | {"--judge": frozen_reward_run(seed, num, threads)}
    return cost.measure(flags, seed, num, threads)


def train(titles, num, workers):
    """What is missing of these methods."""
    results = rows.load_rewarded(RESULTS)
    others = [title for title in titles if title != FROZEN]
    last = [title for title in titles if title == FROZEN]  # it needs a run of the others
    for part in (others, last):
        jobs = {}
        for seed in SEEDS:
            for title in part:
                row = cost.name(METHODS[title], seed, num)
                jobs[row] = lambda threads, t=title, s=seed: measure(t, s, num, threads)
        rows.fill(RESULTS, results, jobs, workers)


def page(num=rows.NUM):
    """results/siblings.md, from the rows that are there."""
    found = cost.found_of(METHODS, rows.load_rewarded(RESULTS), num)
    return pages.joined(
        [
            INTRODUCTION,
            "![DMDR and AdvDMD over training cost](../docs/siblings.png)",
            cost.table("at the last point", found, COLUMNS),
            pages.told(lambda: dmdr_text(found, *beside(num))),
            pages.told(advdmd_text, found),
        ]
    )


def beside(num):
    """What DMDR stands beside: DMD2's ends, the teacher, and the undistilled network that its student starts as."""
    dmd2 = cost.found_of(cost.METHODS, rows.load_rewarded(cost.RESULTS), num)
    table4 = stage2.rows_of("table4", rows.load_rewarded(stage2.RESULTS), num)
    main_ = stage1.rows_of("main", rows.load(stage1.RESULTS), num)
    return at_point(dmd2, BASELINE, -1), table4[stage2.TEACHER], main_["undistilled, 4 steps, w = 1"]


INTRODUCTION = """
# DMDR and AdvDMD

`python -m lab.siblings` trains the rows that are missing in [siblings.json](siblings.json), and writes this page and
its plot; `--print` writes them from the rows that are there.

The two sibling methods on the toy world, with and without their parts: three seeds each, the mean first. Every run is
evaluated at five points of its way, which the plot shows; the table has the last. "RL open" is the share of logged
loops in which AdvDMD's reinforcement ran.
"""


def at_point(found, title, point):
    """A point of each seed's run."""
    return [points[point] for points in found[title].values()]


def dmdr_text(found, dmd2, teacher, undistilled):
    paid, unpaid, static = (at_point(found, title, -1) for title in (PAID, UNPAID, STATIC))
    early, early_static = (at_point(found, title, 0) for title in (UNPAID, STATIC))
    cold, cold_static = (at_point(found, title, COLD) for title in (UNPAID, STATIC))
    return f"""
- **DMDR's reward raises the reward: seen.** It joins after 500 loops, at half the rates (which the row without reward
  does not have), and the reward is {figure(paid, "reward")} for {figure(unpaid, "reward")}
  ({errors(paid, unpaid, "reward")}). What the paper pays for it is not seen: the Fréchet distance is {frechet(paid)}
  for {frechet(unpaid)} ({errors(paid, unpaid, "frechet")}), the recall {figure(paid, "recall")} for
  {figure(unpaid, "recall")} % ({errors(paid, unpaid, "recall")}).
- It has more reward than its 50-step teacher ({figure(paid, "reward")} for {figure(teacher, "reward")}). After half of
  DMD2's loops its Fréchet distance is {frechet(paid)} for {frechet(dmd2)} ({errors(paid, dmd2, "frechet")}).
- **That dynamic training speeds the cold start is not seen.** After {early[0]["loops"]} loops {right(early)} % of the
  prompts are right, {right(early_static)} % without it, and every seed is behind. Just after the cold start's end the
  Fréchet distance is {frechet(cold)} with it and {frechet(cold_static)} without
  ({errors(cold, cold_static, "frechet")}), at the very end {frechet(unpaid)} and {frechet(static)}: behind with every
  seed, but {errors(unpaid, static, "frechet")}. A guess: the toy's student starts as the unguided teacher in 4 steps,
  with {right(undistilled)} % of the prompts right: near enough that no bridge is needed.
"""


def advdmd_text(found):
    online, unrewarded, frozen = (at_point(found, title, -1) for title in (ONLINE, UNREWARDED, FROZEN))
    return f"""
- **AdvDMD's reinforcement changes next to nothing.** {right(online)} % of the prompts are right for
  {right(unrewarded)} % without it, and the Fréchet distance is {frechet(online)} for {frechet(unrewarded)}
  ({errors(online, unrewarded, "frechet")}). Its discriminator hardly learns to tell real from generated: it reads
  features that are too coarse ([discriminator.md](discriminator.md)). The gate was open in {each(online, "rl_open")} %
  of the logged loops. With features of the last block: [steps.md](steps.md).
- **That an online reward is hacked less than a frozen one is within noise.** With a frozen reward, the discriminator at
  the end of the run without RL, {right(frozen)} % are right and the Fréchet distance is {frechet(frozen)}
  ({errors(online, frozen, "frechet")}); the gate was open in {each(frozen, "rl_open")} %.
"""


def write(num):
    """The page and its plot."""
    pages.write("results/siblings.md", num, page(num))
    if found := cost.found_of(METHODS, rows.load_rewarded(RESULTS), num):
        measures = ("frechet", "prompt_accuracy", "recall", "reward")
        cost.plot(found, rows.place("docs/siblings.png", num), measures)


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    if not args.print:
        train(args.only, args.num, args.jobs)
    write(args.num)


if __name__ == "__main__":
    main()
