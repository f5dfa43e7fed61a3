"""The domain router: a closed form of added-up statistics, in any order, of any subset; causal and cautious."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router.router import (
    SMOOTHING,
    UNIFORM_SHARE,
    DomainRouter,
    RouterRows,
    Temperatures,
    router_rows,
)
from lorary.domains.statistics.statistics import (
    PAIR_BUCKETS,
    DomainStatistics,
    causal_means,
    feature_projection,
    hidden_features,
    pair_buckets,
)

VOCABULARY, WIDTH = 40, 8
SEED = st.integers(0, 2**31 - 1)
SLOTS = st.integers(2, 6)
NO_PAIRS = torch.zeros(PAIR_BUCKETS, dtype=torch.int64)


@pytest.fixture(scope="session")
def domains(random_statistics: Callable[..., DomainStatistics]) -> Callable[..., list[DomainStatistics]]:
    """`domains(slots, seed)`: statistics of made-up domains of very different sizes."""

    def make(slots: int, seed: int) -> list[DomainStatistics]:
        return [
            random_statistics(
                seed=(seed + i) % 2**31,
                vocabulary=VOCABULARY,
                features=WIDTH,
                rows=20 + 100 * i,
                tokens=range(i % 5, VOCABULARY),
                total=500 * (i + 1) ** 3,
            )
            for i in range(slots)
        ]

    return make


@pytest.fixture(scope="session")
def router_of() -> Callable[..., DomainRouter]:
    """`router_of(statistics, prior=.., **temperatures)`: a router for hidden states of the small width."""

    def make(
        statistics: Sequence[DomainStatistics],
        prior: Sequence[float] | None = None,
        width: int = WIDTH,
        **temperatures: float,
    ) -> DomainRouter:
        weights = torch.ones(len(statistics)) if prior is None else torch.tensor(prior)
        return DomainRouter(statistics, prior=weights, temperatures=Temperatures(**temperatures), width=width)

    return make


def text(seed: int, seq: int = 20, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (2, seq), generator=generator)
    return ids, torch.randn(2, seq, width, generator=generator), torch.ones(2, seq, dtype=torch.bool)


def pairs_of(ids: Tensor) -> Tensor:
    return torch.bincount(pair_buckets(ids[:-1], ids[1:]), minlength=PAIR_BUCKETS)


def gates_of(router: DomainRouter, ids: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    return router.slot_gates(router.increments(ids, hidden, mask).cumsum(1))


def assert_same(found: RouterRows, expected: RouterRows, slots: Any = slice(None), tolerance: float = 1e-9) -> None:
    """The rows agree to `tolerance`, relative to the largest number of each table."""
    for got, wanted in (
        (found.token_evidence, expected.token_evidence[:, slots]),
        (found.rows, expected.rows[slots]),
        (found.bias, expected.bias[slots]),
    ):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


# --- the closed form ---


@settings(deadline=None, max_examples=50)
@given(slots=SLOTS, seed=SEED, data=st.data())
def test_permuted_slots_permute_the_rows(slots: int, seed: int, data: st.DataObject, domains: Any) -> None:
    statistics = domains(slots, seed)
    order = data.draw(st.permutations(range(slots)))

    found = router_rows([statistics[i] for i in order])

    assert_same(found, router_rows(statistics), slots=list(order))


@settings(deadline=None, max_examples=50)
@given(slots=SLOTS, seed=SEED)
def test_what_is_added_and_removed_again_leaves_no_trace(slots: int, seed: int, domains: Any) -> None:
    *kept, other = domains(slots + 1, seed)

    back = [(one + other) - other for one in kept]

    assert all(torch.equal(a.token_counts, b.token_counts) for a, b in zip(back, kept, strict=True))
    assert_same(router_rows(back), router_rows(kept))


@settings(deadline=None, max_examples=50)
@given(seed=SEED, data=st.data())
def test_a_subset_has_the_router_of_its_data_computed_at_once(seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = [(torch.randint(0, VOCABULARY, (300,), generator=generator), random_features(generator)) for _ in range(5)]
    subset = data.draw(st.lists(st.sampled_from(range(5)), min_size=1, unique=True))
    cuts = [sorted(data.draw(st.lists(st.integers(1, 299), max_size=3, unique=True))) for _ in texts]

    collected = [in_pieces(*text, cut) for text, cut in zip(texts, cuts, strict=True)]  # all five, piece by piece

    at_once = [in_pieces(*texts[i], []) for i in subset]
    assert_same(router_rows([collected[i] for i in subset]), router_rows(at_once))


def random_features(generator: torch.Generator) -> Tensor:
    center = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return center + torch.randn(300, WIDTH, generator=generator, dtype=torch.float64)


def in_pieces(ids: Tensor, features: Tensor, cuts: list[int]) -> DomainStatistics:
    """The statistics of a text, added up over its pieces."""
    parts = [
        DomainStatistics(torch.bincount(i, minlength=VOCABULARY), pairs_of(i), float(len(f)), f.sum(0), f.T @ f)
        for i, f in zip(ids.tensor_split(cuts), features.tensor_split(cuts), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@settings(deadline=None, max_examples=30)
@given(slots=SLOTS, seed=SEED)
def test_discriminant_scores_are_differences_of_mahalanobis_distances(slots: int, seed: int, domains: Any) -> None:
    statistics = domains(slots, seed)
    rows = sum(s.rows for s in statistics)
    means = torch.stack([s.feature_sum / s.rows for s in statistics])
    within: Any = (
        sum(s.feature_outer - s.rows * torch.outer(m, m) for s, m in zip(statistics, means, strict=True)) / rows
    )
    within = within + 0.01 * within.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    x = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    found = router_rows(statistics)
    scores = found.rows @ x + found.bias

    away = x - means
    distances = (away * torch.linalg.solve(within, away.T).T).sum(1)
    torch.testing.assert_close(scores - scores[0], -0.5 * (distances - distances[0]))


@settings(deadline=None, max_examples=30)
@given(slots=SLOTS, seed=SEED)
def test_smoothed_counts_are_a_distribution_and_evidence_is_its_log_ratio(slots: int, seed: int, domains: Any) -> None:
    statistics = domains(slots, seed)
    counts = torch.stack([s.token_counts for s in statistics], 1).double()
    background = (counts / counts.sum(0)).mean(1)
    background = (1 - UNIFORM_SHARE) * background + UNIFORM_SHARE / VOCABULARY
    smoothed = (1 - SMOOTHING) * counts / counts.sum(0) + SMOOTHING * background[:, None]

    found = router_rows(statistics)

    torch.testing.assert_close(smoothed.sum(0), torch.ones(slots, dtype=torch.float64))
    torch.testing.assert_close(found.token_evidence, (smoothed / background[:, None]).log())


def test_a_token_that_only_a_large_slot_has_seen_is_evidence_for_it_however_rare(domains: Any) -> None:
    large, small = domains(2, 0)
    rare = torch.zeros(VOCABULARY, dtype=torch.int64)
    rare[0], rare[1] = 6, 1_000_000
    few = torch.zeros(VOCABULARY, dtype=torch.int64)
    few[2] = 10_000

    found = router_rows([replace(large, token_counts=rare), replace(small, token_counts=few)])

    assert found.token_evidence[0, 0] > found.token_evidence[0, 1]


def test_rows_are_float64_whatever_comes_in(domains: Any) -> None:
    found = router_rows(domains(3, 0))

    assert {found.token_evidence.dtype, found.rows.dtype, found.bias.dtype} == {torch.float64}


# --- gates ---


@settings(deadline=None, max_examples=50)
@given(slots=SLOTS, seed=SEED, cut=st.integers(0, 19))
def test_what_follows_a_position_does_not_change_its_gates(
    slots: int, seed: int, cut: int, domains: Any, router_of: Any
) -> None:
    router = router_of(domains(slots, seed))
    ids, hidden, mask = text(seed)
    other_ids, other_hidden, _ = text(seed + 1)
    other_ids[:, : cut + 1], other_hidden[:, : cut + 1] = ids[:, : cut + 1], hidden[:, : cut + 1]

    found = gates_of(router, other_ids, other_hidden, mask)

    assert torch.equal(found[:, : cut + 1], gates_of(router, ids, hidden, mask)[:, : cut + 1])


@settings(deadline=None, max_examples=50)
@given(slots=SLOTS, seed=SEED, data=st.data())
def test_padding_adds_no_evidence(slots: int, seed: int, data: st.DataObject, domains: Any, router_of: Any) -> None:
    router = router_of(domains(slots, seed))
    ids, hidden, mask = text(seed)
    real = torch.tensor([data.draw(st.lists(st.booleans(), min_size=20, max_size=20)) for _ in range(2)])

    found = gates_of(router, ids, hidden, mask & real)

    for row in range(2):
        kept = real[row]
        if kept.any():
            alone = gates_of(router, ids[row : row + 1, kept], hidden[row : row + 1, kept], mask[row : row + 1, kept])
            torch.testing.assert_close(found[row, kept], alone[0], rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(slots=SLOTS, seed=SEED, data=st.data())
def test_without_evidence_the_gates_are_the_prior(
    slots: int, seed: int, data: st.DataObject, domains: Any, router_of: Any
) -> None:
    prior = data.draw(st.lists(st.floats(0.01, 100), min_size=slots, max_size=slots))
    router = router_of(domains(slots, seed), prior)
    ids, hidden, mask = text(seed)

    found = gates_of(router, ids, hidden, torch.zeros_like(mask))

    torch.testing.assert_close(found, (torch.tensor(prior) / sum(prior)).expand(2, 20, slots))


@settings(deadline=None, max_examples=30)
@given(slots=SLOTS, seed=SEED)
def test_a_domain_of_weight_zero_is_never_chosen(slots: int, seed: int, domains: Any, router_of: Any) -> None:
    statistics = domains(slots, seed)

    found = gates_of(router_of(statistics, [1.0] * (slots - 1) + [0.0]), *text(seed))

    assert found.isfinite().all()
    assert found[..., -1].abs().max() == 0


@settings(deadline=None, max_examples=30)
@given(seed=SEED, slots=SLOTS)
def test_hidden_evidence_is_that_of_the_mean_feature_so_far(
    seed: int, slots: int, domains: Any, router_of: Any, two_steps: Any
) -> None:
    statistics = domains(slots, seed)
    router = router_of(statistics, token=0.0, hidden=0.2)
    ids, hidden, mask = text(seed)

    found = gates_of(router, ids, hidden, mask)

    closed = router_rows(statistics)
    means = causal_means(hidden_features(hidden, None), mask).double()
    expected = two_steps([1.0] * slots, 0.2 * (means @ closed.rows.T + closed.bias))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_wide_hidden_states_are_projected_as_the_statistics_are(random_statistics: Any, router_of: Any) -> None:
    width = 300
    projection = feature_projection(width)
    statistics = [random_statistics(seed=i, vocabulary=VOCABULARY, features=256, rows=600) for i in range(2)]
    router = router_of(statistics, width=width, token=0.0, hidden=0.05)
    ids, hidden, mask = text(0, width=width)

    found = gates_of(router, ids, hidden, mask)

    closed = router_rows(statistics)
    means = causal_means(hidden_features(hidden, projection), mask).double()
    expected = torch.softmax(0.05 * (means @ closed.rows.T + closed.bias), -1)
    assert projection is not None
    assert projection.shape == (256, 300)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


# --- what it is for ---


@pytest.mark.parametrize("slots", [2, 4])
def test_different_token_distributions_are_told_apart(slots: int, random_statistics: Any, router_of: Any) -> None:
    shares = torch.arange(VOCABULARY).chunk(slots)
    statistics = [
        random_statistics(seed=i, vocabulary=VOCABULARY, features=WIDTH, rows=0, tokens=share.tolist())
        for i, share in enumerate(shares)
    ]
    router = router_of(statistics)

    for slot, share in enumerate(shares):
        ids = share[torch.randint(len(share), (1, 16), generator=torch.Generator().manual_seed(slot))]
        found = gates_of(router, ids, torch.zeros(1, 16, WIDTH), torch.ones(1, 16, dtype=torch.bool))
        assert found[0, -1, slot] > 0.99


def test_different_hidden_states_are_told_apart(router_of: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(WIDTH)[:3] * 4

    def hidden(slot: int) -> Tensor:
        return directions[slot] + torch.randn(1, 200, WIDTH, generator=generator)

    statistics = []
    for slot in range(3):
        features = hidden_features(hidden(slot), None)[0].double()
        counts = torch.zeros(VOCABULARY, dtype=torch.int64)
        statistics.append(DomainStatistics(counts, NO_PAIRS, 200.0, features.sum(0), features.T @ features))
    router = router_of(statistics, hidden=1.0)

    for slot in range(3):
        ids, mask = torch.zeros(1, 200, dtype=torch.int64), torch.ones(1, 200, dtype=torch.bool)
        assert gates_of(router, ids, hidden(slot), mask)[0, -1, slot] > 0.99


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1_000, 1_000_000), min_size=2, max_size=5), seed=SEED)
def test_tokens_that_no_domain_has_seen_leave_the_gates_at_the_prior(
    sizes: list[int], seed: int, router_of: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = VOCABULARY // 2
    statistics = []
    for size in sizes:
        counts = torch.zeros(VOCABULARY, dtype=torch.int64)
        counts[:known] = (torch.rand(known, generator=generator) * size / known).long() + 5
        statistics.append(no_features(counts))
    prior = [3.0] + [1.0] * (len(sizes) - 1)
    ids = torch.randint(known, VOCABULARY, (1, 64), generator=generator)

    found = gates_of(router_of(statistics, prior), ids, torch.zeros(1, 64, WIDTH), torch.ones(1, 64, dtype=torch.bool))

    expected = torch.tensor(prior) / sum(prior)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-5)


def no_features(counts: Tensor) -> DomainStatistics:
    """Statistics of which only the token counts say something."""
    features = torch.zeros(WIDTH, dtype=torch.float64)
    return DomainStatistics(counts, NO_PAIRS, 0.0, features, torch.outer(features, features))


@settings(deadline=None, max_examples=30)
@given(seed=SEED, slots=SLOTS, copies=st.integers(1, 9))
def test_what_kp_keeps_does_not_depend_on_how_many_domains_say_the_same(
    seed: int, slots: int, copies: int, domains: Any, router_of: Any
) -> None:
    sums = torch.randn(1, 5, 2 * slots + 1, generator=torch.Generator().manual_seed(seed)).abs()
    evidence, scores, count = sums.split([slots, slots, 1], -1)
    more = torch.cat([evidence, *[evidence[..., -1:]] * copies, scores, *[scores[..., -1:]] * copies, count], -1)
    few, many = router_of(domains(slots, 0)), router_of(domains(slots + copies, 0))
    many.bias = torch.cat([few.bias, few.bias[-1:].expand(copies)])
    few.log_odds = many.log_odds = torch.tensor([0.3])

    found = few.slot_gates(sums), many.slot_gates(more)

    torch.testing.assert_close(found[0][..., 0], found[1][..., 0])


def test_domains_without_any_statistics_stay_at_the_prior(router_of: Any) -> None:
    empty = no_features(torch.zeros(VOCABULARY, dtype=torch.int64))

    found = gates_of(router_of([empty, empty], [3.0, 1.0]), *text(0))

    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]).expand_as(found))
