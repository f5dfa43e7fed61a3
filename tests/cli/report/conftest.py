"""A report in which legal harms medicine, and itself gains nothing."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from lorary.registry.measure.report import RetentionReport
from lorary.registry.measure.scores import CellScores

STEPS = ("base", "general", "medicine", "legal")
TEXTS = 30
BITS = {  # by step: general, medicine, legal
    0: (2.0, 2.0, 2.0),
    1: (2.0, 2.0, 2.0),
    2: (2.0, 1.0, 2.0),
    3: (2.0, 1.54, 2.0),
}
RIGHT = {0: 10, 1: 10, 2: 30, 3: 20}  # of the questions of medicine


@pytest.fixture(scope="session")
def harmed() -> RetentionReport:
    def cell(bits: float, right: int | None = None) -> CellScores:
        asked = () if right is None else tuple(i < right for i in range(TEXTS))
        nats = (bits * math.log(2),) * TEXTS
        return CellScores(text_nats=nats, text_bytes=(1,) * TEXTS, right=asked, taken={"general": TEXTS})

    cells = {(i, j): cell(b, RIGHT[i] if j == 1 else None) for i, row in BITS.items() for j, b in enumerate(row)}
    scores: Any = SimpleNamespace(
        steps=STEPS,
        columns=STEPS[1:],
        manifests=[SimpleNamespace(version=1, digest="sha256:0")] * 3,
        data=[SimpleNamespace(name=name, texts=(), questions=(), digest="sha256:1") for name in STEPS[1:]],
        cells=cells,
        alone=(cell(2.0), cell(1.0, 30), cell(2.0)),
        drift=(SimpleNamespace(domains=0, mean_kl=0.0, top1_flips=0),) * 2,
    )
    return RetentionReport(scores)
