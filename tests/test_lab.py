"""The lab's rule for verdicts."""

import pytest

from lab.claims import verdict
from lab.cost import share


def test_two_standard_errors_decide():
    """By hand: variances 1 and 0 over three seeds and two make a standard error of sqrt(1/3)."""
    gain, error, judged = verdict([4.0, 5.0, 6.0], [3.0, 3.0], 1)
    assert (gain, error, judged) == (2.0, pytest.approx(3**-0.5), "holds")
    assert verdict([4.0, 5.0, 6.0], [3.0, 3.0], -1)[2] == "does not hold"
    assert verdict([4.0, 5.0, 6.0], [4.0, 4.0], 1)[2] == "within noise"  # 1 < 2 x 0.577
    assert verdict([4.0], [3.0, 3.0], 1) == (1.0, None, "one seed, not judged")


def test_share_of_the_baselines_cost():
    """By hand: the baseline is best at 300; Flash-DMD does as well first at 60, a fifth; what it never reaches is a bound."""
    baseline = [{"samples": n, "frechet": f} for n, f in ((100, 5.0), (200, 4.0), (300, 3.0), (400, 3.5))]
    flash = [{"samples": n, "frechet": f} for n, f in ((30, 3.2), (60, 2.9), (90, 3.1))]
    assert share(flash, baseline, "frechet", -1) == (0.2, True)
    assert share(flash[:1], baseline, "frechet", -1) == (0.1, False)
