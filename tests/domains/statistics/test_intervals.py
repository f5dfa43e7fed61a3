"""Wilson intervals against published values, and properties of the bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.statistics.intervals import percentile_interval, ratio_draws, wilson_interval


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, table I
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10_000)), min_size=1, max_size=12))
def test_draws_stay_between_the_lowest_and_the_highest_ratio(texts: list[tuple[float, int]]):
    above, below = zip(*texts, strict=True)
    ratios = [a / b for a, b in texts]

    draws = ratio_draws([above], below, draws=50)

    assert draws.shape == (50, 1)
    assert min(ratios) - 1e-9 <= draws.min() <= draws.max() <= max(ratios) + 1e-9 + 1e-12 * max(ratios)


def test_rows_share_their_draws():
    above = np.random.default_rng(0).uniform(1, 2, 40)

    draws = ratio_draws([above, above + 0.5 * np.arange(1, 41)], np.arange(1, 41))

    assert np.allclose(draws[:, 1] - draws[:, 0], 0.5)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0, 1, 400)

    low, high = percentile_interval(ratio_draws([values], np.ones(400), draws=4000)) or (0, 0)

    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_draws_that_are_not_finite_are_ignored():
    assert percentile_interval([np.nan, np.nan]) is None
    assert percentile_interval([np.nan, 1.0]) == (1.0, 1.0)
