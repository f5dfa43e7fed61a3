"""Token evidence: naive Bayes smoothed towards the background, and a sparse table of it that says the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router.evidence import (
    SMOOTHING,
    UNIFORM_SHARE,
    expected_evidence,
    look_up,
    sparse_evidence,
    token_evidence,
)

COUNTS = st.lists(st.lists(st.integers(0, 500), min_size=9, max_size=9).filter(any), min_size=2, max_size=5)
SEED = st.integers(0, 2**31 - 1)


def drawn(seed: int, slots: int, kinds: int) -> list[Tensor]:
    """Counts with an empty slot, kinds that all have seen, and kinds that none has seen."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 200, (slots, kinds), generator=generator)
    counts *= torch.rand(slots, kinds, generator=generator) < 0.4
    counts[:, 0], counts[:, -1] = 7, 0
    if seed % 3 == 0:
        counts[seed % slots] = 0
    return list(counts)


def table_of(groups: list[list[Tensor]], *, scale: float = 1.0) -> tuple[dict[str, Tensor], int]:
    table = sparse_evidence(groups, scale=scale)
    return table, int(table["starts"].diff().max().clamp(min=1))


# --- what it says ---


@settings(max_examples=50)
@given(counts=COUNTS, text=st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_token_evidence_is_the_log_probability_of_scikit_learn(counts: list[list[int]], text: list[int]) -> None:
    naive_bayes = pytest.importorskip("sklearn.naive_bayes")
    shares = np.array([np.array(slot) / sum(slot) for slot in counts])
    background = (1 - UNIFORM_SHARE) * shares.mean(0) + UNIFORM_SHARE / shares.shape[1]

    evidence = token_evidence([torch.tensor(slot) for slot in counts]).numpy() + np.log(SMOOTHING)

    # fitted on shares, not counts: the weight of pseudo-counts depends on the amount of text
    bayes = naive_bayes.MultinomialNB(alpha=SMOOTHING / (1 - SMOOTHING) * background, fit_prior=False)
    bayes.fit(shares, np.arange(len(counts)))
    np.testing.assert_allclose(evidence + np.log(background)[:, None], bayes.feature_log_prob_.T, rtol=1e-9)
    document = np.bincount(text, minlength=shares.shape[1])
    posterior = torch.tensor(document @ evidence).log_softmax(0)
    np.testing.assert_allclose(posterior, bayes.predict_log_proba(document[None])[0], atol=1e-9)


@settings(max_examples=30)
@given(seed=SEED, slots=st.integers(1, 6))
def test_smoothed_counts_are_a_distribution_and_evidence_is_its_log_ratio(seed: int, slots: int) -> None:
    counts = torch.stack(drawn(3 * (seed // 3) + 1, slots, 23), 1).double()
    shares = counts / counts.sum(0)
    background = (1 - UNIFORM_SHARE) * shares.mean(1) + UNIFORM_SHARE / 23
    smoothed = (1 - SMOOTHING) * shares + SMOOTHING * background[:, None]

    found = token_evidence(list(counts.long().T))

    assert found.dtype == torch.float64
    torch.testing.assert_close(smoothed.sum(0), torch.ones(slots, dtype=torch.float64))
    torch.testing.assert_close(found, (smoothed / background[:, None]).log() - torch.tensor(SMOOTHING).double().log())


def test_a_token_that_only_a_large_slot_has_seen_is_evidence_for_it_however_rare() -> None:
    large, small = torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    large[0], large[1], small[2] = 6, 1_000_000, 10_000

    found = token_evidence([large, small])

    assert found[0, 0] > found[0, 1]


def test_kinds_that_a_slot_has_not_seen_have_no_evidence_whatever_they_are() -> None:
    counts = drawn(1, 4, 30)

    found = token_evidence(counts)

    for slot, seen in enumerate(counts):
        assert not found[seen == 0, slot].any()
        assert (found[seen > 0, slot] > 0).all()


# --- the sparse table ---


@settings(max_examples=60)
@given(seed=SEED, slots=st.integers(1, 6), scale=st.floats(0.05, 3))
def test_a_look_up_has_the_differences_of_the_dense_evidence(seed: int, slots: int, scale: float) -> None:
    tokens, pairs = drawn(seed, slots, 23), drawn(seed + 1, slots, 31)
    table, most = table_of([tokens, pairs], scale=scale)
    dense = scale * torch.cat([token_evidence(tokens), token_evidence(pairs)])
    kinds = torch.randint(0, 54, (2, 7, 2), generator=torch.Generator().manual_seed(seed))

    found = look_up(table, kinds, slots=slots, most=most)

    expected = dense[kinds].sum(-2)
    assert found.shape == (2, 7, slots)
    torch.testing.assert_close(
        (found - found[..., :1]).double(), expected - expected[..., :1], rtol=1e-5, atol=1e-5 * scale
    )


@settings(max_examples=30)
@given(seed=SEED, slots=st.integers(2, 6), data=st.data())
def test_any_subset_of_slots_in_any_order_has_the_table_of_its_counts(
    seed: int, slots: int, data: st.DataObject
) -> None:
    counts = drawn(seed, slots, 23)
    chosen = data.draw(st.lists(st.sampled_from(range(slots)), min_size=1, unique=True))
    kinds = torch.arange(24)[:, None]  # the last one is the empty row

    (some, most), (ordered, _) = (
        table_of([[counts[i] for i in chosen]]),
        table_of([[counts[i] for i in sorted(chosen)]]),
    )
    found = look_up(some, kinds, slots=len(chosen), most=most)
    expected = look_up(ordered, kinds, slots=len(chosen), most=most)

    order = [sorted(chosen).index(i) for i in chosen]
    torch.testing.assert_close(found, expected[:, order], rtol=1e-6, atol=1e-6)
    assert not found[-1].any()


def test_kinds_that_nobody_has_seen_have_the_empty_row() -> None:
    table, most = table_of([drawn(1, 3, 23), drawn(2, 3, 31)])

    found = look_up(table, torch.tensor([[22], [53], [54]]), slots=3, most=most)

    assert not found.any()
    assert int(table["starts"][-1]) == int(table["starts"][-2])


@pytest.mark.parametrize("slots", [2, 300])
def test_entries_are_as_many_as_the_counts_that_are_not_zero(slots: int) -> None:
    counts = drawn(1, slots, 50)

    table, most = table_of([counts])

    seen = torch.stack(counts) > 0
    assert len(table["values"]) == len(table["columns"]) == int(seen.sum())
    assert most == int(seen.sum(0).max())
    found = look_up(table, torch.arange(50)[:, None], slots=slots, most=most)
    assert torch.equal(found > 0, seen.T)


@settings(max_examples=20)
@given(seed=SEED, larger=st.integers(1, 1000))
def test_memory_does_not_depend_on_the_size_of_the_vocabulary(seed: int, larger: int) -> None:
    counts = drawn(seed, 3, 23)
    padded = [torch.cat([one, torch.zeros(larger, dtype=torch.int64)]) for one in counts]

    small, most = table_of([counts])
    large, _ = table_of([padded])

    assert torch.equal(large["columns"], small["columns"])
    assert len(large["starts"]) == len(small["starts"]) + larger
    found = look_up(large, torch.arange(22, 23 + larger)[:, None], slots=3, most=most)
    assert not found.any()  # tokens that nobody has seen are no evidence, in a vocabulary of any size


@pytest.mark.parametrize("empty", [0, 1])
def test_all_slots_without_text_have_an_empty_table(empty: int) -> None:
    nothing = torch.zeros(9, dtype=torch.int64)
    other = nothing if empty == 0 else torch.arange(9)

    table, most = table_of([[nothing, other]])

    found = look_up(table, torch.arange(10)[:, None], slots=2, most=most)
    assert not found[:, 0].any()
    assert bool(found[:, 1].any()) == (empty == 1)


@settings(max_examples=30)
@given(seed=SEED, slots=st.integers(1, 5))
def test_expected_evidence_is_the_mean_by_share(seed: int, slots: int) -> None:
    tokens, pairs = drawn(seed, slots, 23), drawn(seed + 1, slots, 31)
    table, _ = table_of([tokens, pairs])
    shares = torch.rand(31, generator=torch.Generator().manual_seed(seed))

    found = expected_evidence(table, shares, first=23, slots=slots)

    torch.testing.assert_close(found.double(), shares.double() @ token_evidence(pairs), rtol=1e-4, atol=1e-4)
