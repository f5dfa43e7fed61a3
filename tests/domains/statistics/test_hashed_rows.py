"""Moments of hashed features: mean and trace are exact, factors the largest eigenpairs, and parts add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.domains.statistics.hashed_rows import EIGENPAIRS, MAX_ROWS, HashedRows, hashed_moments, no_hashed_rows
from lorary.domains.statistics.hashing import HASHED

SEED = st.integers(0, 2**31 - 1)


def sparse_rows(seed: int, rows: int, *, rank: int | None = None) -> Tensor:
    """Rows as of short texts: few entries each; of low rank if it is given."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(rank or rows, HASHED, generator=generator)
    kinds *= torch.rand(kinds.shape, generator=generator) < 0.01
    return kinds if rank is None else torch.randn(rows, rank, generator=generator) @ kinds / rank**0.5


def moments_times(part: HashedRows, x: Tensor) -> Tensor:
    factors = part.factors.double()
    return factors.T @ (factors @ x)


def trace(rows: Tensor) -> float:
    return float(rows.double().square().sum() / max(len(rows), 1))


def kept_trace(part: HashedRows) -> float:
    return float(part.factors.double().square().sum())


@pytest.mark.parametrize(("rows", "rank"), [(1, None), (7, None), (EIGENPAIRS, None), (400, 30), (700, None)])
def test_mean_and_trace_are_those_of_the_rows_however_many(rows: int, rank: int | None) -> None:
    data = sparse_rows(rows, rows, rank=rank)

    found = hashed_moments(data)

    assert found.rows == rows
    assert len(found.factors) <= EIGENPAIRS
    torch.testing.assert_close(found.mean, data.mean(0))
    assert kept_trace(found) + found.cut == pytest.approx(trace(data), rel=1e-3)


@pytest.mark.parametrize(("rows", "rank"), [(60, None), (400, 30), (900, 100)])
def test_moments_of_low_rank_are_kept_whole(rows: int, rank: int | None) -> None:
    data, x = sparse_rows(1, rows, rank=rank), torch.randn(HASHED, 3, dtype=torch.float64)

    found = hashed_moments(data)

    exact = data.double()
    expected = exact.T @ (exact @ x) / rows
    torch.testing.assert_close(moments_times(found, x), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    assert found.cut < 2e-3 * trace(data)


def test_factors_are_the_largest_eigenpairs_largest_first() -> None:
    data = sparse_rows(2, 600, rank=200)
    values = torch.linalg.svdvals(data.double() / 600**0.5).square()

    found = hashed_moments(data)

    sizes = found.factors.double().square().sum(1)
    assert len(sizes) == EIGENPAIRS
    assert (sizes.diff() <= 1e-3 * sizes[0]).all()
    assert kept_trace(found) >= 0.98 * values[:EIGENPAIRS].sum()
    torch.testing.assert_close(sizes[:16], values[:16], rtol=0.01, atol=0)
    inner = found.factors.double() @ found.factors.double().T
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=2e-3 * float(sizes[0]))


@settings(max_examples=15)
@given(seed=SEED, sizes=st.lists(st.integers(0, 50), min_size=2, max_size=4))
def test_moments_of_parts_add_up_to_those_of_the_whole(seed: int, sizes: list[int]) -> None:
    parts = [sparse_rows(seed // 8 + i, size) for i, size in enumerate(sizes)]
    data = torch.cat(parts)
    whole, added = hashed_moments(data), no_hashed_rows()

    for part in parts:
        added = added + hashed_moments(part)

    assert added.rows == whole.rows == len(data)
    torch.testing.assert_close(added.mean, whole.mean, rtol=1e-5, atol=1e-7)
    # what the factors leave out is counted, each time that something is left out
    assert kept_trace(added) + added.cut == pytest.approx(trace(data), rel=2e-3, abs=1e-9)
    if 0 < len(data) <= EIGENPAIRS:
        x = torch.randn(HASHED, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = moments_times(whole, x)
        tolerance = 3e-3 * float(expected.abs().max())
        torch.testing.assert_close(moments_times(added, x), expected, rtol=3e-3, atol=tolerance)


def test_the_order_of_addition_matters_no_more_than_what_is_left_out() -> None:
    a, b, c = (hashed_moments(sparse_rows(seed, 100, rank=40) * (seed + 1)) for seed in range(3))

    left, right = (a + b) + c, c + (b + a)

    assert left.rows == right.rows
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-5, atol=1e-7)
    assert left.cut + kept_trace(left) == pytest.approx(right.cut + kept_trace(right), rel=1e-4)
    x = torch.randn(HASHED, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (moments_times(left, x) - moments_times(right, x)).norm() / x.norm()
    assert difference <= (left.cut + right.cut) + 2e-3 * kept_trace(left)


def test_adding_nothing_changes_nothing() -> None:
    some, nothing = hashed_moments(sparse_rows(0, 9)), hashed_moments(torch.zeros(0, HASHED))

    assert some + nothing is some
    assert nothing + some is some
    assert (nothing + nothing).rows == 0
    assert nothing.factors.shape == (0, HASHED)


def test_rows_of_zeros_have_no_factors_and_no_trace() -> None:
    found = hashed_moments(torch.zeros(5, HASHED))

    assert (found.rows, found.cut, len(found.factors)) == (5.0, 0.0, 0)
    assert (found + hashed_moments(sparse_rows(0, 5))).rows == 10


def test_of_many_rows_an_even_sample_is_used() -> None:
    rows = torch.zeros(3 * MAX_ROWS, HASHED)
    rows[:, 0] = 1.0
    rows[::2, 1] = 1.0

    found = hashed_moments(rows)

    assert found.rows == MAX_ROWS
    assert found.mean[0] == 1.0
    assert found.mean[1] == pytest.approx(0.5, abs=0.01)


def test_the_same_rows_give_the_same_moments_whatever_the_seed() -> None:
    data = sparse_rows(3, 500)
    first = hashed_moments(data)
    torch.manual_seed(77)
    torch.set_default_dtype(torch.float64)
    try:
        again = hashed_moments(data)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(first.factors, again.factors)
    assert first.cut == again.cut
