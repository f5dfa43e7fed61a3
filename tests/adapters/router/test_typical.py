"""Pairs of tokens as evidence, and the gates of a domain's typical text, computed from statistics alone."""

from typing import Any

import pytest
import torch

from lorary.adapters.router.evidence import token_evidence
from lorary.adapters.router.router import (
    FIRST_EDITION,
    METHOD,
    TYPICAL_TOKENS,
    DomainRouter,
    Temperatures,
    discriminant_rows,
    last_tokens,
    typical_gates,
)
from lorary.domains.statistics.hashing import PAIR_BUCKETS, pair_buckets
from lorary.domains.statistics.statistics import DomainStatistics

VOCABULARY, WIDTH = 40, 8  # as in the fixtures


def test_the_typical_text_of_a_domain_of_one_token_is_that_token_repeated(
    random_statistics: Any, two_steps: Any
) -> None:
    statistics = [random_statistics(seed=i, vocabulary=VOCABULARY, features=WIDTH, tokens=[i]) for i in range(3)]
    prior, temperatures = torch.tensor([3.0, 1.0, 2.0]), Temperatures(token=0.05, hidden=0.3)
    router = DomainRouter(statistics, prior=prior, temperatures=temperatures, width=WIDTH)

    found = typical_gates(router, statistics)

    closed = discriminant_rows(statistics)
    of_tokens = token_evidence([one.token_counts for one in statistics])
    of_pairs = token_evidence([one.pair_counts for one in statistics])
    for slot, one in enumerate(statistics):
        pair = pair_buckets(torch.tensor(slot), torch.tensor(slot))
        tokens = 0.05 * TYPICAL_TOKENS * (of_tokens[slot] + of_pairs[pair])
        hidden = 0.3 * (closed.rows @ (one.feature_sum / one.rows) + closed.bias)
        expected = two_steps([3.0, 1.0, 2.0], tokens + hidden)
        torch.testing.assert_close(found[slot].double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_the_last_token_passes_over_padding_and_continues_what_was_read() -> None:
    ids = torch.tensor([[7, 8, 9, 5], [7, 8, 9, 5]])
    mask = torch.tensor([[False, True, False, True], [True, True, True, True]])

    found = last_tokens(ids, mask, torch.tensor([3, -1]))

    assert found.tolist() == [[3, 3, 8, 8, 5], [-1, 7, 8, 9, 5]]


def test_a_pair_is_evidence_in_however_many_pieces_it_is_read(random_statistics: Any) -> None:
    statistics = [random_statistics(seed=i, vocabulary=VOCABULARY, features=WIDTH) for i in range(3)]
    router = DomainRouter(statistics, prior=torch.ones(3), temperatures=Temperatures(), width=WIDTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=generator)
    hidden, mask = torch.randn(2, 20, WIDTH, generator=generator), torch.ones(2, 20, dtype=torch.bool)
    whole = router.increments(ids, hidden, mask)

    parts = [router.increments(ids[:, :7], hidden[:, :7], mask[:, :7])]
    parts.append(
        router.increments(ids[:, 7:], hidden[:, 7:], mask[:, 7:], last_tokens(ids[:, 7:], mask[:, 7:], ids[:, 6]))
    )

    torch.testing.assert_close(torch.cat(parts, 1), whole)
    router.values[int(router.starts[VOCABULARY]) :] = 0
    assert not torch.allclose(router.increments(ids, hidden, mask), whole)


@pytest.mark.parametrize(
    ("temperatures", "expected"),
    [
        (
            FIRST_EDITION,
            [[0.49960, 0.20047, 0.29993], [0.35096, 0.45831, 0.19073], [0.22845, 0.68944, 0.08210]]
            + [[0.04128, 0.94172, 0.01699]],
        ),
        (
            Temperatures(token=0.6, hidden=0.4, half_life=32.0),
            [[0.47406, 0.18881, 0.33713], [0.20308, 0.65580, 0.14112], [0.09577, 0.87534, 0.02889]]
            + [[0.00707, 0.99059, 0.00233]],
        ),
    ],
    ids=["first edition", "second edition"],
)
def test_other_gates_need_another_method(temperatures: Temperatures, expected: list[list[float]]) -> None:
    """Kept compositions and scores are found by METHOD: whoever changes these numbers raises it."""
    statistics = []
    for i in range(3):
        text = torch.arange(60) * (i + 2) % 8
        rows = torch.stack([torch.arange(6.0) % (i + 2), torch.arange(6.0) * (-1) ** i], 1).double()
        pairs = torch.bincount(pair_buckets(text[:-1], text[1:]), minlength=PAIR_BUCKETS)
        counts = torch.bincount(text, minlength=8)
        statistics.append(DomainStatistics(counts, pairs, 6.0, rows.sum(0), rows.T @ rows))
    router = DomainRouter(statistics, prior=torch.tensor([3.0, 1.0, 1.0]), temperatures=temperatures, width=2)
    ids, hidden = torch.tensor([[0, 3, 6, 1]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]])

    found = router.text_gates(ids, hidden, torch.ones(1, 4, dtype=torch.bool))

    assert METHOD == 4
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=0, atol=2e-5)
