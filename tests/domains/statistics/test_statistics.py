"""Statistics add up over any split of the text, of both editions, and are stored bit for bit."""

from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from lorary.domains.errors import IncompatibleError
from lorary.domains.statistics.hashed_rows import HashedRows, hashed_moments, no_hashed_rows
from lorary.domains.statistics.hashing import HASHED, PAIR_BUCKETS
from lorary.domains.statistics.statistics import (
    FIRST_FEATURES,
    MAX_TOKENS,
    MIN_COUNT,
    DomainStatistics,
    first_projection,
    rounded,
)

torch.set_num_threads(1)
SEED = st.integers(0, 2**31 - 1)


def random_statistics(
    seed: int, *, vocabulary: int = 30, features: int = 6, rows: int = 17, first: bool = False
) -> DomainStatistics:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (vocabulary,), generator=generator)
    pairs = torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
    pairs[torch.randint(0, PAIR_BUCKETS, (200,), generator=generator)] = torch.randint(
        1, 12, (200,), generator=generator
    )
    data = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    outer = data.T @ data
    if first:
        return DomainStatistics(counts, pairs, float(rows), data.sum(0), outer)
    hashed = torch.randn(rows, HASHED, generator=generator) * (torch.rand(rows, HASHED, generator=generator) < 0.01)
    return DomainStatistics(counts, pairs, float(rows), data.sum(0), rounded(outer), hashed_moments(hashed))


def assert_counts_equal(found: DomainStatistics, expected: DomainStatistics) -> None:
    assert torch.equal(found.token_counts, expected.token_counts)
    assert torch.equal(found.pair_counts, expected.pair_counts)
    assert found.rows == expected.rows


def assert_same(found: DomainStatistics, expected: DomainStatistics) -> None:
    """They are equal bit for bit."""
    assert_counts_equal(found, expected)
    assert torch.equal(found.feature_sum, expected.feature_sum)
    assert torch.equal(found.feature_outer, expected.feature_outer)
    if found.hashed is None or expected.hashed is None:
        assert found.hashed is expected.hashed
    else:
        assert (found.hashed.rows, found.hashed.cut) == (expected.hashed.rows, expected.hashed.cut)
        assert torch.equal(found.hashed.mean, expected.hashed.mean)
        assert torch.equal(found.hashed.factors, expected.hashed.factors)


# --- adding ---


@settings(max_examples=20)
@given(seeds=st.lists(SEED, min_size=2, max_size=5), data=st.data(), first=st.booleans())
def test_counts_add_up_exactly_in_any_order_and_grouping_and_moments_up_to_rounding(
    seeds: list[int], data: st.DataObject, first: bool
) -> None:
    parts = [random_statistics(seed, first=first) for seed in seeds]
    order = data.draw(st.permutations(range(len(parts))))
    cut = data.draw(st.integers(1, len(parts) - 1))
    mixed = [parts[i] for i in order]

    found, expected = reduce(add, mixed[:cut]) + reduce(add, mixed[cut:]), reduce(add, parts)

    assert_counts_equal(found, expected)
    assert found.token_counts.tolist() == [sum(int(part.token_counts[i]) for part in parts) for i in range(30)]
    exact = torch.stack([part.feature_outer for part in parts]).sum(0)
    tolerance = 1e-12 if first else len(parts) * 2.0**-24
    for one in (found, expected):
        torch.testing.assert_close(one.feature_outer, exact, rtol=tolerance, atol=tolerance * float(exact.max()))
        torch.testing.assert_close(one.feature_sum, sum(part.feature_sum for part in parts), rtol=1e-12, atol=1e-12)
        assert torch.equal(one.feature_outer, one.feature_outer.T) or first
        assert (one.hashed is None) == first


def test_two_parts_in_either_order_are_equal_bit_for_bit() -> None:
    a, b = random_statistics(1), random_statistics(2)

    found, expected = a + b, b + a

    assert_counts_equal(found, expected)
    assert torch.equal(found.feature_sum, expected.feature_sum)
    assert torch.equal(found.feature_outer, expected.feature_outer)


def test_the_sum_of_two_editions_is_of_the_first() -> None:
    old, new = random_statistics(1, first=True), random_statistics(2)

    assert (old + new).hashed is None
    assert (new + old).hashed is None


@pytest.mark.parametrize("first", [False, True])
def test_emptied_statistics_add_nothing(first: bool) -> None:
    some = random_statistics(3, first=first)

    nothing = some.emptied()

    assert nothing.rows == 0
    assert not nothing.token_counts.any()
    assert_same(some + nothing, some)
    assert_same(nothing + some, some)


@pytest.mark.parametrize("other", [{"vocabulary": 31}, {"features": 7}])
def test_statistics_of_different_models_cannot_be_added(other: Any) -> None:
    with pytest.raises(IncompatibleError, match="different base models"):
        _ = random_statistics(0) + random_statistics(0, **other)


@settings(max_examples=20)
@given(seed=SEED)
def test_rare_tokens_are_dropped_and_the_rest_is_kept(seed: int) -> None:
    statistics = random_statistics(seed)

    kept = statistics.without_rare_tokens()

    for name in ("token_counts", "pair_counts"):
        before, after = getattr(statistics, name), getattr(kept, name)
        assert torch.equal(after, before * (before >= MIN_COUNT))
    assert_same(kept.without_rare_tokens(), kept)
    assert_same(kept.with_counts(statistics.token_counts, statistics.pair_counts), statistics)


# --- the first edition ---


def features_of(seed: int, width: int, rows: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) + 0.3


def of_features(features: Tensor, *, first: bool = False) -> DomainStatistics:
    counts, pairs = torch.arange(9), torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
    outer = features.T @ features
    parts = (counts, pairs, float(len(features)), features.sum(0))
    return DomainStatistics(*parts, outer) if first else DomainStatistics(*parts, rounded(outer), no_hashed_rows())


@pytest.mark.parametrize("width", [8, FIRST_FEATURES, FIRST_FEATURES + 1, 576, 1024])
def test_as_the_first_edition_they_are_those_of_its_features(width: int) -> None:
    features = features_of(0, width)
    projection = first_projection(width)
    projected = features if projection is None else features @ projection.double().T

    found = of_features(features).first_edition(width)

    expected = of_features(projected, first=True)
    assert found.hashed is None
    assert_counts_equal(found, expected)
    assert len(found.feature_sum) == min(width, FIRST_FEATURES)
    torch.testing.assert_close(found.feature_sum, expected.feature_sum, rtol=1e-9, atol=1e-9)
    scale = float(expected.feature_outer.abs().max())
    torch.testing.assert_close(found.feature_outer, expected.feature_outer, rtol=0, atol=1e-6 * scale)
    assert_same(found.first_edition(width), found)


def test_of_wider_bases_no_first_edition_can_be_computed() -> None:
    with pytest.raises(IncompatibleError, match="two editions") as caught:
        of_features(features_of(0, 1024, rows=3)).first_edition(1536)

    assert "1536" in str(caught.value.cause)
    assert "1024" in str(caught.value.cause)
    assert "registry init" in str(caught.value.fix)


def test_the_projection_of_the_first_edition_never_changes() -> None:
    projection = first_projection(300)

    assert projection is not None
    assert projection.shape == (FIRST_FEATURES, 300)
    # recorded with torch 2.13: another value would invalidate stored statistics
    assert projection[0, 0].item() == pytest.approx(0.0295334850, rel=1e-5)
    assert first_projection(FIRST_FEATURES) is None
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(first_projection(300), projection)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)


# --- storing ---


@settings(max_examples=20)
@given(seed=SEED, first=st.booleans(), parts=st.integers(1, 2))
def test_stored_statistics_are_restored_bit_for_bit(seed: int, first: bool, parts: int) -> None:
    statistics = reduce(add, [random_statistics(seed // 2 + i, first=first) for i in range(parts)])

    loaded = DomainStatistics.from_tensors(load(save(statistics.tensors())))

    assert_same(loaded, statistics)
    assert loaded.token_counts.dtype == torch.int64
    assert loaded.feature_sum.dtype == loaded.feature_outer.dtype == torch.float64


@pytest.mark.parametrize("first", [False, True])
def test_empty_statistics_are_restored(first: bool) -> None:
    nothing = random_statistics(0, first=first).emptied()

    assert_same(DomainStatistics.from_tensors(load(save(nothing.tensors()))), nothing)


def test_moments_take_a_triangle_of_float32() -> None:
    tensors = random_statistics(0, features=20).tensors()

    assert tensors["feature_triangle"].shape == (210,)
    assert tensors["feature_triangle"].dtype == torch.float32
    assert "feature_outer" not in tensors
    assert tensors["hashed_factors"].dtype == torch.float16


def changed(name: str, value: Any) -> dict[str, Tensor]:
    tensors = random_statistics(0).tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("vocabulary", lambda _: torch.tensor([0]), ValueError),
        ("vocabulary", lambda _: torch.tensor([MAX_TOKENS + 1]), ValueError),
        ("vocabulary", lambda _: torch.tensor([5]), IndexError),
        ("vocabulary", lambda _: torch.tensor([5, 5]), RuntimeError),
        ("vocabulary", None, KeyError),
        ("token_ids", lambda ids: ids + 30, IndexError),
        ("token_ids", lambda ids: ids[:-1], (IndexError, RuntimeError)),
        ("pair_ids", lambda ids: ids + PAIR_BUCKETS, IndexError),
        ("pair_counts", lambda counts: counts[1:], (IndexError, RuntimeError)),
        ("rows", lambda rows: rows.repeat(2), RuntimeError),
        ("rows", None, KeyError),
        ("feature_sum", lambda total: total[:-1], ValueError),
        ("feature_sum", None, KeyError),
        ("feature_triangle", lambda triangle: triangle[:-1], ValueError),
        ("feature_triangle", None, KeyError),
        ("hashed_rows", lambda rows: rows[:1], ValueError),
        ("hashed_rows", lambda rows: rows[0], ValueError),
        ("feature_sum", lambda total: total[0], ValueError),
        ("feature_sum", lambda total: total.repeat(20_000), ValueError),  # whose square would not fit into memory
        ("hashed_rows", None, KeyError),
        ("hashed_mean", lambda mean: mean[:-1], ValueError),
        ("hashed_mean", None, KeyError),
        ("hashed_factors", lambda factors: factors[:, 1:], ValueError),
        ("hashed_factors", lambda factors: factors[0], ValueError),
        ("hashed_factors", None, KeyError),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(name: str, value: Any, error: Any) -> None:
    with pytest.raises(error):
        DomainStatistics.from_tensors(changed(name, value))


def test_moments_of_another_shape_are_named() -> None:
    tensors = changed("hashed_mean", lambda mean: mean[:7])

    with pytest.raises(ValueError, match=r"shapes .*7.*4096"):
        DomainStatistics.from_tensors(tensors)


def test_parts_of_hashed_rows_are_kept_with_their_trace() -> None:
    statistics = random_statistics(0)
    hashed = HashedRows(17.0, torch.zeros(HASHED), torch.zeros(0, HASHED, dtype=torch.float16), 0.1 + 0.2)

    loaded = DomainStatistics.from_tensors(load(save(replace(statistics, hashed=hashed).tensors())))

    assert loaded.hashed is not None
    assert loaded.hashed.cut == 0.1 + 0.2
