"""What three seeds decide: two standard errors of a difference."""

from statistics import mean, variance

from lab.rows import SEEDS

SMALLER = ("frechet", "contrast")  # is better, in these measures


def verdict(better, worse, sign):
    """Values over seeds of both sides -> (difference towards the claim, its standard error, the verdict).

    Two standard errors decide. With no effect, three seeds pass this bar in more than a tenth of all cases. The two
    sides count as independent, though they share data, and some share a stage-1 run. With fewer seeds than SEEDS
    nothing is decided.
    """
    gain = sign * (mean(better) - mean(worse))
    if (seeds := min(len(better), len(worse))) < len(SEEDS):
        return gain, None, f"{seeds} of {len(SEEDS)} seeds, not decided"
    error = standard_error(better, worse)
    return gain, error, "holds" if gain > 2 * error else "does not hold" if gain < -2 * error else "within noise"


def standard_error(a, b):
    """Of the difference of two means over seeds."""
    return (variance(a) / len(a) + variance(b) / len(b)) ** 0.5


def at_best(runs, sign):
    """Values of each run, point by point -> each run's value at its best point before the last.

    The mean of the other runs chooses the point, so that no run's own noise chooses for it.
    """
    chosen = []
    for run in runs:
        others = [r for r in runs if r is not run] or [run]
        points = range(len(run) - 1)
        best = max(points, key=lambda i: sign * mean(r[i] for r in others))
        chosen.append(run[best])
    return chosen
