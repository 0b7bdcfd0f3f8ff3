"""Statistics against worked examples."""

import pytest

from flaxmnist.sweeps import statistics


def test_summary_by_hand():
    """The 97.5 % quantile of Student's t with 3 degrees of freedom is 3.182."""
    summary = statistics.summarise([1.0, 2.0, 3.0, 4.0])
    deviation = (5 / 3) ** 0.5
    assert summary.n == 4
    assert summary.mean == 2.5
    assert summary.std == pytest.approx(deviation)
    assert summary.ci95 == pytest.approx((2.5 - 3.1824 * deviation / 2, 2.5 + 3.1824 * deviation / 2), rel=1e-4)
    assert (summary.min, summary.max) == (1, 4)


def test_too_few_values_have_no_spread():
    assert vars(statistics.summarise([])) == dict.fromkeys(("mean", "std", "ci95", "min", "max")) | {"n": 0}
    assert statistics.summarise([0.5]).std is None


def test_comparison_pairs_seeds():
    """The differences at common seeds are −1, −2, −3, so t = −2 / (1 / √3)."""
    reference, other = {0: 5.0, 1: 6.0, 2: 7.0, 9: 0.0}, {2: 4.0, 1: 4.0, 0: 4.0, 8: 1.0}
    comparison = statistics.compare(reference, other)
    assert comparison.n == 3
    assert comparison.mean == -2
    assert comparison.p_value == pytest.approx(0.0742, abs=1e-4)
    for equal in ({0: 1.0, 1: 1.0}, {0: 0.3, 1: 0.4}):
        assert statistics.compare({0: 0.1, 1: 0.2}, equal | {0: equal[1] - 0.1}).p_value is None
