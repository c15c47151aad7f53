"""DMDR and AdvDMD on the toy world: what each of their parts does to quality, reward and recall.

    python -m lab.siblings              what is missing in results/siblings.json, then the table; lab.claims judges their claims by it
    python -m lab.siblings --print      from what is there

Every run is evaluated at five points of its way, as in lab/cost.py. AdvDMD is our reconstruction (advdmd.py), DMDR that of its public schedules.
"""

from pathlib import Path

from lab import cost, rows
from lab.stage1 import SEEDS

RESULTS = Path("results/siblings.json")
DMDR = {"--preset": "dmdr", "--iterations": 1000}  # G moves in every fifth loop: 100 updates of cold start, 100 with reward
ADVDMD = {"--preset": "advdmd", "--iterations": 400, "--ttur": 2, "--rl-after": 60}  # 60 updates of G before RL, 140 with it
UNREWARDED, FROZEN = "AdvDMD, no RL", "AdvDMD, frozen reward"
METHODS = {
    "DMDR": DMDR,
    "DMDR, no reward": DMDR | {"--reward-weight": 0},
    "DMDR, no reward, no dynamic training": DMDR | {"--reward-weight": 0, "--dynamic": 0},
    "AdvDMD": ADVDMD,
    UNREWARDED: ADVDMD | {"--rl-after": 10**6},
    FROZEN: ADVDMD | {"--judge": UNREWARDED},  # the discriminator at the end of that row's run
}
COLUMNS = ("samples", "prompt_accuracy", "frechet", "recall", "reward", "saturation", "contrast")


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


def main():
    args = rows.options(__doc__.split("\n")[0], tuple(METHODS))
    results = rows.load(RESULTS, reward_crc32=rows.crc32("toy/lrm/unet/diffusion_pytorch_model.safetensors"))
    if not args.print:
        for titles in ([t for t in args.only if t != FROZEN], [t for t in args.only if t == FROZEN]):  # one after the other
            chosen = [(t, seed) for seed in SEEDS for t in titles]
            jobs = {cost.name(METHODS[t], s, args.num): lambda threads, t=t, s=s: measure(t, s, args.num, threads) for t, s in chosen}
            rows.fill(RESULTS, results, jobs, args.jobs)
    cost.table("DMDR, AdvDMD", cost.found_of(METHODS, results, args.num), COLUMNS)


if __name__ == "__main__":
    main()
