"""The domain router: a closed form of added-up statistics, in any order, of any subset; causal and cautious."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router.evidence import token_evidence
from lorary.adapters.router.router import (
    FIRST_EDITION,
    DomainRouter,
    Temperatures,
    discriminant_rows,
)
from lorary.domains.statistics.fading import HALF_LIFE
from lorary.domains.statistics.hashing import MAX_FEATURES, PAIR_BUCKETS, feature_projection, pair_buckets
from lorary.domains.statistics.measure import hidden_features
from lorary.domains.statistics.statistics import FIRST_FEATURES, DomainStatistics, first_projection
from lorary.domains.statistics.token_roles import TokenRoles

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
        **temperatures: Any,
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
    return router.text_gates(ids, hidden, mask)


def assert_same(
    found: Sequence[DomainStatistics], expected: Sequence[DomainStatistics], slots: Any = slice(None)
) -> None:
    """The evidence and rows agree, relative to the largest number of each."""
    got, wanted = (tables_of(one) for one in (found, expected))
    for one, other in zip(got, wanted, strict=True):
        other = other[slots]
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def tables_of(statistics: Sequence[DomainStatistics]) -> tuple[Tensor, ...]:
    closed = discriminant_rows(statistics)
    return token_evidence([one.token_counts for one in statistics]).T, closed.rows, closed.bias


# --- the closed form ---


@settings(deadline=None, max_examples=50)
@given(slots=SLOTS, seed=SEED, data=st.data())
def test_permuted_slots_permute_the_rows(slots: int, seed: int, data: st.DataObject, domains: Any) -> None:
    statistics = domains(slots, seed)
    order = data.draw(st.permutations(range(slots)))

    assert_same([statistics[i] for i in order], statistics, slots=list(order))


@settings(deadline=None, max_examples=50)
@given(seed=SEED, data=st.data())
def test_a_subset_has_the_router_of_its_data_computed_at_once(seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = [(torch.randint(0, VOCABULARY, (300,), generator=generator), random_features(generator)) for _ in range(5)]
    subset = data.draw(st.lists(st.sampled_from(range(5)), min_size=1, unique=True))
    cuts = [sorted(data.draw(st.lists(st.integers(1, 299), max_size=3, unique=True))) for _ in texts]

    collected = [in_pieces(*text, cut) for text, cut in zip(texts, cuts, strict=True)]  # all five, piece by piece

    at_once = [in_pieces(*texts[i], []) for i in subset]
    assert_same([collected[i] for i in subset], at_once)


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

    found = discriminant_rows(statistics, pooled=True)
    scores = found.rows @ x + found.bias

    away = x - means
    distances = (away * torch.linalg.solve(within, away.T).T).sum(1)
    torch.testing.assert_close(scores - scores[0], -0.5 * (distances - distances[0]))


def test_rows_are_float64_whatever_comes_in(domains: Any) -> None:
    found = discriminant_rows(domains(3, 0))

    assert {found.rows.dtype, found.bias.dtype} == {torch.float64}


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


def faded_means(features: Tensor, half_life: float | None) -> Tensor:
    """By definition: the mean of what was read, in which a token of text counts half after `half_life` more."""
    left = 1.0 if half_life is None else 2 ** (-1 / half_life)
    total, count, found = torch.zeros_like(features[:, 0]).double(), 0.0, []
    for position in range(features.shape[1]):
        total, count = left * total + features[:, position], left * count + 1
        found.append(total / count)
    return torch.stack(found, 1)


@settings(deadline=None, max_examples=30)
@given(seed=SEED, slots=SLOTS, half_life=st.sampled_from([None, 8.0, HALF_LIFE]))
def test_hidden_evidence_is_that_of_the_faded_mean_feature(
    seed: int, slots: int, half_life: float | None, domains: Any, router_of: Any, two_steps: Any
) -> None:
    statistics = domains(slots, seed)
    router = router_of(statistics, token=0.0, hidden=0.2, ridge=0.0, half_life=half_life)
    ids, hidden, mask = text(seed)

    found = gates_of(router, ids, hidden, mask)

    closed = discriminant_rows(statistics, pooled=half_life is None)
    means = faded_means(hidden_features(hidden, None), half_life)
    expected = two_steps([1.0] * slots, 0.2 * (means @ closed.rows.T + closed.bias))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "first"), [(300, True), (1100, False)])
def test_wide_hidden_states_are_projected_as_the_statistics_are(
    width: int, first: bool, random_statistics: Any, router_of: Any
) -> None:
    projection = first_projection(width) if first else feature_projection(width)
    assert projection is not None
    features = FIRST_FEATURES if first else MAX_FEATURES
    assert projection.shape == (features, width)
    statistics = [random_statistics(seed=i, vocabulary=VOCABULARY, features=features, rows=2000) for i in range(2)]
    half_life = None if first else HALF_LIFE
    router = router_of(statistics, width=width, token=0.0, hidden=0.05, ridge=0.0, half_life=half_life)
    ids, hidden, mask = text(0, width=width)

    found = gates_of(router, ids, hidden, mask)

    closed = discriminant_rows(statistics, pooled=first)
    means = faded_means(hidden_features(hidden, projection), half_life)
    expected = torch.softmax(0.05 * (means @ closed.rows.T + closed.bias), -1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


# --- the first edition ---


@settings(deadline=None, max_examples=30)
@given(seed=SEED, slots=SLOTS, data=st.data())
def test_of_the_first_edition_evidence_is_a_plain_sum_of_all_tokens(
    seed: int, slots: int, data: st.DataObject, domains: Any, two_steps: Any
) -> None:
    """As it was before evidence faded: packs of old stores are routed as on the day when they were trained."""
    statistics = domains(slots, seed)
    prior = data.draw(st.lists(st.floats(0.1, 10), min_size=slots, max_size=slots))
    flags = torch.full((VOCABULARY,), 15, dtype=torch.uint8)  # roles that the second edition would heed
    router = DomainRouter(
        statistics, prior=torch.tensor(prior), temperatures=FIRST_EDITION, width=WIDTH, roles=TokenRoles(flags)
    )
    ids, hidden, mask = text(seed)

    found = gates_of(router, ids, hidden, mask)

    def dense(counts: Tensor) -> Tensor:  # (slots, kinds)
        shares = counts.double() / counts.sum(1, keepdim=True)
        background = 0.98 * shares.mean(0) + 0.02 / counts.shape[1]
        return ((0.7 * shares + 0.3 * background) / background).log()

    tokens = dense(torch.stack([one.token_counts for one in statistics]))
    pairs = dense(torch.stack([one.pair_counts for one in statistics]))
    added = tokens.T[ids]
    added[:, 1:] += pairs.T[pair_buckets(ids[:, :-1], ids[:, 1:])]
    closed = discriminant_rows(statistics, pooled=True)
    features = hidden_features(hidden, None).double()
    means = features.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
    evidence = 0.4 * added.cumsum(1) + 0.4 * (means @ closed.rows.T + closed.bias)
    expected = two_steps(prior, evidence)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert router.text_mask(ids, mask).all()
    assert router.tensors()["step"].item() == 0


def test_the_first_edition_has_no_additional_steps_in_prompts(domains: Any) -> None:
    flags = torch.full((VOCABULARY,), 15, dtype=torch.uint8)
    router = DomainRouter(
        domains(3, 0), prior=torch.ones(3), temperatures=FIRST_EDITION, width=WIDTH, roles=TokenRoles(flags)
    )
    ids, hidden, mask = text(0)

    assert torch.equal(router.text_gates(ids, hidden, mask, as_prompts=True), router.text_gates(ids, hidden, mask))
    assert not router.steps(ids, mask, prompt_ends=torch.full((2, 1), 19)).any()


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
