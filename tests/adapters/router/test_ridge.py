"""Ridge evidence equals a dense solve with the same second moments, scaled by a variance within bounds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router import ridge
from lorary.adapters.router.ridge import LEAST_RESIDUAL, SHRINKAGE, ridge_weights
from lorary.domains.statistics.hashed_rows import HashedRows, hashed_moments, no_hashed_rows
from lorary.domains.statistics.hashing import HASHED

SEED = st.integers(0, 2**31 - 1)


def slots_of(seed: int, sizes: list[int], *, kinds: int = 60) -> list[HashedRows]:
    """Rows of a few entries among the same kinds, of which each slot prefers some."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(HASHED, generator=generator)[:kinds]
    found = []
    for size in sizes:
        rows = torch.zeros(size, HASHED)
        taste = torch.rand(kinds, generator=generator) ** 3
        drawn = torch.rand(size, kinds, generator=generator) < taste
        rows[:, places] = drawn.float() / drawn.sum(1, keepdim=True).clamp(min=1).sqrt()
        found.append(hashed_moments(rows))
    return found


def dense_direction(slots: list[HashedRows]) -> Tensor:
    """(G + lambda I)^-1 C without Woodbury, in float64."""
    count = len(slots)
    factors = torch.cat([part.factors.double() for part in slots]) / count**0.5
    cut = sum(part.cut for part in slots) / count
    trace = float(factors.square().sum()) + cut
    means = torch.stack([part.mean.double() for part in slots], 1) / count
    centred = means - means.mean(1, keepdim=True)
    # features that no row has change nothing
    seen = (factors.abs().sum(0) + centred.abs().sum(1)).nonzero().flatten()
    gram = factors[:, seen].T @ factors[:, seen]
    gram.diagonal().add_((cut + SHRINKAGE * trace) / HASHED)
    found = torch.zeros_like(centred)
    found[seen] = torch.linalg.solve(gram, centred[seen])
    return found


@pytest.mark.parametrize("sizes", [[40, 40], [5, 300, 60]])
def test_weights_are_those_of_a_dense_solve_up_to_one_factor(sizes: list[int]) -> None:
    slots = slots_of(len(sizes), sizes)
    expected = dense_direction(slots)

    found = ridge_weights(slots).double()

    factor = float((found * expected).sum() / expected.square().sum())
    # float32, where lambda is a small share of the largest eigenvalue
    torch.testing.assert_close(found, factor * expected, rtol=0, atol=2e-3 * float(found.abs().max()))
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 1 - 1e-5
    # 1 / variance: no less than where nothing is explained, no more than where all seems to be
    count = len(slots)
    whole = (1 - 1 / count) / count
    assert 1 / whole * 0.999 <= factor <= 1 / (LEAST_RESIDUAL * whole) * 1.001


@settings(max_examples=10)
@given(seed=SEED, sizes=st.lists(st.integers(1, 80), min_size=2, max_size=5), data=st.data())
def test_the_order_of_slots_does_not_matter_up_to_rounding(seed: int, sizes: list[int], data: Any) -> None:
    slots = slots_of(seed, sizes)
    order = data.draw(st.permutations(range(len(sizes))))

    found = ridge_weights([slots[i] for i in order])

    expected = ridge_weights(slots)[:, order]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * float(expected.abs().max()) + 1e-9)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 1 - 1e-5 or not expected.any()


@settings(max_examples=10)
@given(seed=SEED, sizes=st.lists(st.integers(1, 200), min_size=2, max_size=5))
def test_weights_are_finite_balanced_and_bounded(seed: int, sizes: list[int]) -> None:
    slots = slots_of(seed, sizes)

    found = ridge_weights(slots)

    assert found.dtype == torch.float32
    assert found.isfinite().all()
    # indicators of all slots sum to one, so that what speaks for one speaks against the others
    torch.testing.assert_close(found.sum(1), torch.zeros(HASHED), rtol=0, atol=5e-3 * float(found.abs().max()) + 1e-9)
    # |W| <= |C| / lambda, over the least variance
    count, trace = len(slots), sum(float(s.factors.float().square().sum()) + s.cut for s in slots) / len(sizes)
    means = torch.stack([part.mean for part in slots], 1) / count
    bound = (means - means.mean(1, keepdim=True)).norm() * HASHED / (SHRINKAGE * trace)
    assert found.norm() <= 1.01 * bound * count / (LEAST_RESIDUAL * (1 - 1 / count))


@pytest.mark.parametrize("sizes", [[], [50]])
def test_fewer_than_two_slots_have_no_ridge_evidence(sizes: list[int]) -> None:
    assert not ridge_weights(slots_of(0, sizes)).any()
    assert ridge_weights(slots_of(0, sizes)).shape == (HASHED, len(sizes))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_slot_without_rows_leaves_the_term_out(where: int) -> None:
    slots = slots_of(0, [30, 30])
    slots.insert(where, no_hashed_rows())

    assert torch.equal(ridge_weights(slots), torch.zeros(HASHED, 3))


def test_slots_of_the_same_text_are_not_told_apart() -> None:
    (one,) = slots_of(0, [60])

    assert ridge_weights([one, one]).abs().max() < 1e-3


def test_slots_are_told_apart_by_their_own_rows() -> None:
    slots = slots_of(4, [200, 200, 200])

    found = ridge_weights(slots)

    scores = torch.stack([part.mean for part in slots]) @ found
    assert scores.argmax(1).tolist() == [0, 1, 2]


def test_what_says_little_weighs_little() -> None:
    """Rows that differ hardly between slots have a residual near the whole, others one near its least."""
    apart = slots_of(1, [300, 300], kinds=40)
    noise = torch.zeros(600, HASHED)
    noise[:, torch.randint(0, HASHED, (40,), generator=torch.Generator().manual_seed(0))] = torch.randn(
        600, 40, generator=torch.Generator().manual_seed(1)
    )
    alike = [hashed_moments(part) for part in noise.split(300)]

    def factor(slots: list[HashedRows]) -> float:
        direction = dense_direction(slots)
        return float((ridge_weights(slots).double() * direction).sum() / direction.square().sum())

    assert factor(alike) < 0.6 * factor(apart)
    assert factor(alike) == pytest.approx(4.0, rel=0.2)


def test_small_eigenpairs_beyond_the_limit_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_of(2, [200, 200], kinds=100)
    whole = ridge_weights(slots)
    monkeypatch.setattr(ridge, "MOST_PAIRS", 120)

    factors, cut = ridge._joint_factors(slots)
    found = ridge_weights(slots)

    assert len(factors) == 120
    before = sum(float(part.factors.float().square().sum()) + part.cut for part in slots) / 2
    assert float(factors.square().sum()) + cut == pytest.approx(before, rel=1e-4)
    assert torch.cosine_similarity(found.flatten(), whole.flatten(), dim=0) > 0.9
