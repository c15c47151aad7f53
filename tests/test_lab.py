"""The lab's rule for verdicts."""

import pytest

from lab.claims import verdict


def test_two_standard_errors_decide():
    """By hand: variances 1 and 0 over three seeds and two make a standard error of sqrt(1/3)."""
    gain, error, judged = verdict([4.0, 5.0, 6.0], [3.0, 3.0], 1)
    assert (gain, error, judged) == (2.0, pytest.approx(3**-0.5), "holds")
    assert verdict([4.0, 5.0, 6.0], [3.0, 3.0], -1)[2] == "does not hold"
    assert verdict([4.0, 5.0, 6.0], [4.0, 4.0], 1)[2] == "within noise"  # 1 < 2 x 0.577
    assert verdict([4.0], [3.0, 3.0], 1) == (1.0, None, "one seed, not judged")
