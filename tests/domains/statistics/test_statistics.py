"""Statistics are additive over any split of the text, and equal what the router computes at routing time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from lorary.domains.base_model import find_layout
from lorary.domains.data.blocks import NO_TARGET, Blocks
from lorary.domains.errors import IncompatibleError
from lorary.domains.statistics.statistics import (
    MAX_FEATURES,
    MIN_COUNT,
    PAIR_BUCKETS,
    DomainStatistics,
    causal_means,
    feature_projection,
    hidden_features,
    measure_statistics,
    pair_buckets,
)

torch.set_num_threads(1)
SEED = st.integers(0, 2**31 - 1)


def blocks_of(lengths: list[int], *, block: int = 16, seed: int = 0, vocabulary: int = 128) -> Blocks:
    """Random text of these lengths, padded on the right with 0, which is also a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (len(lengths), block), generator=generator)
    mask = (torch.arange(block) < torch.tensor(lengths)[:, None]).long()
    return Blocks(ids * mask, torch.where(mask.bool(), ids, NO_TARGET), mask)


def part(blocks: Blocks, rows: slice) -> Blocks:
    return Blocks(blocks.input_ids[rows], blocks.labels[rows], blocks.attention_mask[rows])


def random_statistics(seed: int, vocabulary: int = 30, features: int = 6) -> DomainStatistics:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (vocabulary,), generator=generator)
    pairs = torch.randint(0, 12, (PAIR_BUCKETS,), generator=generator)
    data = torch.randn(17, features, generator=generator, dtype=torch.float64)
    return DomainStatistics(counts, pairs, 17.0, data.sum(0), data.T @ data)


def assert_equal(found: DomainStatistics, expected: DomainStatistics, tolerance: float = 0.0) -> None:
    assert torch.equal(found.token_counts, expected.token_counts)
    assert torch.equal(found.pair_counts, expected.pair_counts)
    assert found.rows == expected.rows
    torch.testing.assert_close(found.feature_sum, expected.feature_sum, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.feature_outer, expected.feature_outer, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def measure(tiny_llama: Any) -> Callable[..., tuple[DomainStatistics, Tensor]]:
    """`measure(blocks, ...)`: statistics under one random model, at decoder layer 1."""
    model = tiny_llama()

    def run(blocks: Blocks, **options: Any) -> tuple[DomainStatistics, Tensor]:
        return measure_statistics(model, find_layout(model), blocks, layer=1, **options)

    run.model = model  # type: ignore[attr-defined]
    return run


# --- measuring ---


def test_tokens_are_counted_and_padding_is_not(measure: Any) -> None:
    blocks = blocks_of([16, 5, 1])

    found, _ = measure(blocks)

    text = torch.cat([row[:length] for row, length in zip(blocks.input_ids, (16, 5, 1), strict=True)])
    assert torch.equal(found.token_counts, torch.bincount(text, minlength=128))
    assert found.token_counts.sum() == 22


def test_pairs_are_counted_without_padding(measure: Any) -> None:
    blocks = blocks_of([16, 5, 1])

    found, _ = measure(blocks)

    rows = [row[:length] for row, length in zip(blocks.input_ids, (16, 5, 1), strict=True)]
    expected = torch.cat([pair_buckets(row[:-1], row[1:]) for row in rows])
    assert torch.equal(found.pair_counts, torch.bincount(expected, minlength=PAIR_BUCKETS))
    assert found.pair_counts.sum() == 15 + 4


def test_feature_rows_are_causal_means_at_powers_of_two(measure: Any) -> None:
    blocks = blocks_of([16, 5, 1])

    found, means = measure(blocks)

    rows, last = [], []
    for ids, length in zip(blocks.input_ids, (16, 5, 1), strict=True):
        with torch.no_grad():
            output = measure.model(ids[None, :length], output_hidden_states=True)
        features = hidden_features(output.hidden_states[1], None)[0]
        rows += [features[:n].mean(0) for n in (1, 2, 4, 8, 16) if n <= length]
        last.append(features.mean(0))
    data = torch.stack(rows).double()
    assert found.rows == len(rows) == 9
    torch.testing.assert_close(found.feature_sum, data.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.feature_outer, data.T @ data, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(means, torch.stack(last), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 16), min_size=2, max_size=7), seed=SEED, data=st.data())
def test_statistics_of_parts_add_up_to_those_of_the_whole(
    lengths: list[int], seed: int, data: st.DataObject, measure: Any
) -> None:
    blocks = blocks_of(lengths, seed=seed)
    cut = data.draw(st.integers(1, len(lengths) - 1))

    first, _ = measure(part(blocks, slice(cut)))
    second, _ = measure(part(blocks, slice(cut, None)))

    assert_equal(first + second, measure(blocks)[0], tolerance=1e-4)
    assert_equal(second + first, first + second)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_batch_size_has_no_effect(measure: Any, batch: int) -> None:
    blocks, reported = blocks_of([16, 3, 9, 1, 16]), []

    found, means = measure(blocks, batch=batch, on_batch=lambda done, of: reported.append((done, of)))
    expected, expected_means = measure(blocks, batch=5)

    assert_equal(found, expected, tolerance=1e-4)
    torch.testing.assert_close(means, expected_means)
    assert reported[-1] == (5, 5)


def test_measuring_does_not_change_the_model(measure: Any) -> None:
    before = {name: tensor.clone() for name, tensor in measure.model.state_dict().items()}

    measure(blocks_of([16, 2]))

    assert all(torch.equal(tensor, before[name]) for name, tensor in measure.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in measure.model.modules())


def test_wide_hidden_states_are_projected(tiny_llama: Any) -> None:
    model = tiny_llama(hidden_size=320, num_hidden_layers=2)

    found, means = measure_statistics(model, find_layout(model), blocks_of([16]), layer=1)

    assert found.feature_sum.shape == (MAX_FEATURES,)
    assert means.shape == (1, MAX_FEATURES)
    assert found.feature_outer.dtype == torch.float64


# --- features ---


def test_the_projection_never_changes() -> None:
    first, again = feature_projection(300), feature_projection(300)

    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    # recorded with torch 2.13: another value would invalidate stored statistics
    assert first[0, 0].item() == pytest.approx(0.0295334850, rel=1e-5)
    assert feature_projection(MAX_FEATURES) is None


def test_features_do_not_depend_on_the_norm_of_the_hidden_state() -> None:
    hidden = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(hidden_features(hidden * 1e4, None), hidden_features(hidden, None), rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden_features(hidden * 0, None), torch.zeros(1, 3, 8))


@settings(deadline=None, max_examples=30)
@given(seed=SEED, masked=st.lists(st.booleans(), min_size=9, max_size=9))
def test_causal_means_ignore_padding(seed: int, masked: list[bool]) -> None:
    features = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([masked])

    found = causal_means(features, mask)

    for t in range(9):
        kept = features[0, : t + 1][mask[0, : t + 1]]
        expected = kept.mean(0) if len(kept) else torch.zeros(4)
        torch.testing.assert_close(found[0, t], expected, rtol=1e-4, atol=1e-5)


# --- adding, removing, storing ---


@settings(deadline=None, max_examples=30)
@given(seeds=st.tuples(SEED, SEED, SEED))
def test_addition_is_commutative_and_subtraction_is_exact(seeds: tuple[int, int, int]) -> None:
    a, b, c = (random_statistics(seed) for seed in seeds)

    assert_equal((a + b) + c, a + (c + b), tolerance=1e-12)
    assert_equal((a + b) - b, a, tolerance=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=SEED)
def test_rare_tokens_are_dropped_and_the_rest_is_kept(seed: int) -> None:
    statistics = random_statistics(seed)

    kept = statistics.without_rare_tokens()

    for before, after in zip(statistics.token_counts.tolist(), kept.token_counts.tolist(), strict=True):
        assert after == (before if before >= MIN_COUNT else 0)
    assert kept.rows == statistics.rows
    assert_equal(kept.without_rare_tokens(), kept)


@settings(deadline=None, max_examples=30)
@given(seed=SEED)
def test_stored_statistics_are_restored_bit_for_bit(seed: int) -> None:
    statistics = random_statistics(seed).without_rare_tokens()

    loaded = DomainStatistics.from_tensors(load(save(statistics.tensors())))

    assert_equal(loaded, statistics)
    assert loaded.token_counts.dtype == torch.int64
    assert loaded.feature_sum.dtype == torch.float64


def test_empty_statistics_are_restored() -> None:
    nothing = DomainStatistics(
        torch.zeros(9, dtype=torch.int64),
        torch.zeros(PAIR_BUCKETS, dtype=torch.int64),
        0.0,
        torch.zeros(2).double(),
        torch.zeros(2, 2).double(),
    )

    assert_equal(DomainStatistics.from_tensors(load(save(nothing.tensors()))), nothing)


def test_measured_statistics_are_restored_bit_for_bit(measure: Any) -> None:
    found, _ = measure(blocks_of([16, 7]))

    assert_equal(DomainStatistics.from_tensors(load(save(found.tensors()))), found)


@pytest.mark.parametrize("other", [{"vocabulary": 31}, {"features": 7}])
def test_statistics_of_different_models_cannot_be_added(other: dict[str, int]) -> None:
    for operation in (DomainStatistics.__add__, DomainStatistics.__sub__):
        with pytest.raises(IncompatibleError, match="different base models"):
            operation(random_statistics(0), random_statistics(0, **other))
