"""Hidden-state evidence from additive sums equals scikit-learn's linear discriminant analysis of the rows."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router.router import RIDGE, discriminant_rows
from lorary.domains.statistics.hashing import PAIR_BUCKETS
from lorary.domains.statistics.statistics import DomainStatistics

discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")

FEATURES = 6
# scikit-learn uses (1 - s) C + s (tr C / p) I, the router C + RIDGE (tr C / p) I: with this s the covariance of
# scikit-learn is that of the router divided by 1 + RIDGE
SHRINKAGE = RIDGE / (1 + RIDGE)


def feature_rows(seed: int, sizes: Sequence[int]) -> list[Tensor]:
    """Correlated features with a random mean for each slot."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    rows = [torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) @ mix for size in sizes]
    return [part + 2 * torch.randn(FEATURES, generator=generator, dtype=torch.float64) for part in rows]


def statistics_of(rows: Tensor) -> DomainStatistics:
    none = torch.zeros(4, dtype=torch.int64), torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
    return DomainStatistics(*none, float(len(rows)), rows.sum(0), rows.T @ rows)


@given(seed=st.integers(0, 2**31 - 1), sizes=st.lists(st.integers(20, 90), min_size=3, max_size=5))
def test_rows_and_biases_are_those_of_scikit_learn(seed: int, sizes: list[int]) -> None:
    slots = feature_rows(seed, sizes)
    sums = [statistics_of(rows[:9]) + statistics_of(rows[9:]) for rows in slots]

    found = discriminant_rows(sums, pooled=True)

    labels = np.repeat(np.arange(len(sizes)), sizes)
    lda = discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
    lda.fit(torch.cat(slots).numpy(), labels)
    np.testing.assert_allclose(found.rows * (1 + RIDGE), lda.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias * (1 + RIDGE), lda.intercept_ - np.log(lda.priors_), rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 2**31 - 1), sizes=st.lists(st.integers(20, 90), min_size=3, max_size=5))
def test_the_covariance_of_the_second_edition_is_the_mean_of_those_of_the_slots(seed: int, sizes: list[int]) -> None:
    slots = feature_rows(seed, sizes)
    within = sum(np.cov(rows.numpy().T, bias=True) for rows in slots) / len(sizes)
    within = within + RIDGE * np.trace(within) / FEATURES * np.eye(FEATURES)
    means = np.stack([rows.mean(0).numpy() for rows in slots])

    found = discriminant_rows([statistics_of(rows) for rows in slots])

    expected = np.linalg.solve(within, means.T).T
    np.testing.assert_allclose(found.rows, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias, -0.5 * (means * expected).sum(1), rtol=1e-6, atol=1e-8)
