"""What is measured on a router: the gates of a domain's typical text, and the tempers that held-out text asks for."""

from typing import Any

import torch
from torch import Tensor

from lorary.adapters.router import TYPICAL_TOKENS, DomainRouter, Tempers, calibrate, router_rows, typical_gates

VOCABULARY, WIDTH = 40, 8  # as in the fixtures


def test_the_typical_text_of_a_domain_of_one_token_is_that_token_repeated(
    random_statistics: Any, two_steps: Any
) -> None:
    statistics = [random_statistics(seed=i, vocabulary=VOCABULARY, features=WIDTH, tokens=[i]) for i in range(3)]
    prior, tempers = torch.tensor([3.0, 1.0, 2.0]), Tempers(token=0.05, hidden=0.3)
    router = DomainRouter(statistics, prior=prior, tempers=tempers, width=WIDTH)

    found = typical_gates(router, statistics)

    closed = router_rows(statistics)
    for slot, one in enumerate(statistics):
        tokens = 0.05 * TYPICAL_TOKENS * closed.token_evidence[slot]
        hidden = 0.3 * (closed.rows @ (one.feature_sum / one.rows) + closed.bias)
        expected = two_steps([3.0, 1.0, 2.0], tokens + hidden)
        torch.testing.assert_close(found[slot].double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_calibration_believes_evidence_that_is_right_and_doubts_evidence_that_is_wrong(
    random_statistics: Any,
) -> None:
    kinds = range(VOCABULARY), range(1, VOCABULARY)
    statistics = [
        random_statistics(
            seed=i, vocabulary=VOCABULARY, features=WIDTH, rows=20 + 100 * i, tokens=kinds[i], total=500 * (i + 1) ** 3
        )
        for i in range(2)
    ]
    router = DomainRouter(statistics, prior=torch.ones(2), tempers=Tempers(token=1.0, hidden=1.0), width=WIDTH)
    generator = torch.Generator().manual_seed(0)

    def windows(slot: int) -> Tensor:
        weights = statistics[slot].token_counts.float()
        ids = torch.multinomial(weights, 8 * 32, replacement=True, generator=generator).view(8, 32)
        hidden = torch.randn(8, 32, WIDTH, generator=generator)  # says nothing
        return router.increments(ids, hidden, torch.ones(8, 32, dtype=torch.bool)).cumsum(1)

    right = calibrate(router, [windows(0), windows(1)], [0, 1])
    wrong = calibrate(router, [windows(0), windows(1)], [1, 0])

    assert right.token > wrong.token
    assert wrong.token == 0.05
