"""DMDR and AdvDMD on the toy world: what each of their parts does to quality, reward and recall.

    python -m lab.siblings              what is missing in results/siblings.json, then the table and docs/siblings.png; lab.claims judges by it
    python -m lab.siblings --print      from what is there

Every run is evaluated at five points of its way, as in lab/cost.py. AdvDMD is our reconstruction (advdmd.py), DMDR that of its public schedules.
"""

from pathlib import Path

from lab import cost, rows
from lab.stage1 import SEEDS, SETTINGS, spelt

RESULTS = Path("results/siblings.json")
DMDR = spelt((*SETTINGS, "fake_lora", "dynamic", "real_scale", "reward_weight", "reward_margin"), "dmdr")
DMDR |= {"--iterations": 1000}  # G moves in every fifth loop: 100 updates of cold start, 100 with reward
COLD = 2  # the first of its five points that the cold start, 500 loops, is behind
ADVDMD = spelt((*SETTINGS, "gan", "critic_weight", "candidates", "rl_gate", "rl_after"), "advdmd")
ADVDMD |= {"--iterations": 400, "--ttur": 2, "--rl-after": 60}  # 60 updates of G before RL, 140 with it
PAID, UNPAID, STATIC = "DMDR", "DMDR, no reward", "DMDR, no reward, no dynamic training"
JUDGED, UNREWARDED, FROZEN = "AdvDMD", "AdvDMD, no RL", "AdvDMD, frozen reward"
METHODS = {
    PAID: DMDR,
    UNPAID: DMDR | {"--reward-weight": 0},
    STATIC: DMDR | {"--reward-weight": 0, "--dynamic": 0},
    JUDGED: ADVDMD,
    UNREWARDED: ADVDMD | {"--rl-after": 10**6},
    FROZEN: ADVDMD | {"--judge": UNREWARDED},  # the discriminator at the end of that row's run
}
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast", "rl_open")


def judge(seed, num, threads):
    """The folder of the UNREWARDED run of a seed; trained here where it is not there."""
    out = rows.folder(cost.name(METHODS[UNREWARDED], seed, num))
    if not (out / f"metrics-{ADVDMD['--iterations']}.json").exists():
        cost.run(METHODS[UNREWARDED], out, seed, num, threads)
    return out


def measure(title, seed, num, threads):
    """-> metrics at five points of a row's run."""
    flags, out = METHODS[title], rows.folder(cost.name(METHODS[title], seed, num))
    if title == UNREWARDED:
        return cost.run(flags, out, seed, num, threads)  # stays: FROZEN is rewarded by it
    if title == FROZEN:
        flags = flags | {"--judge": judge(seed, num, threads)}
    return cost.measure(flags, seed, num, threads)


def train(titles, num, workers):
    """What is missing of these methods."""
    results = rows.load_rewarded(RESULTS)
    for part in ([t for t in titles if t != FROZEN], [t for t in titles if t == FROZEN]):  # one after the other
        chosen = [(t, seed) for seed in SEEDS for t in part]
        jobs = {cost.name(METHODS[t], s, num): lambda threads, t=t, s=s: measure(t, s, num, threads) for t, s in chosen}
        rows.fill(RESULTS, results, jobs, workers)


def plot(found, num):
    if found:
        cost.plot(found, rows.place("docs/siblings.png", num), ("frechet", "prompt_accuracy", "recall", "reward"))


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    if not args.print:
        train(args.only, args.num, args.jobs)
    found = cost.found_of(METHODS, rows.load_rewarded(RESULTS), args.num)
    cost.table("DMDR, AdvDMD", found, COLUMNS)
    plot(found, args.num)


if __name__ == "__main__":
    main()
