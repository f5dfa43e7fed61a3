"""Shares of gains that are noise: never a number, and no threshold is met, whatever the scores are."""

import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.errors import GateFailedError, IncompatibleError
from lorary.domains.scoring.language import score_language
from lorary.registry.measure.evaluate import DomainScores
from lorary.registry.measure.measurable import MIN_GAIN, MIN_TEXTS, why_not_measurable
from lorary.registry.measure.report import RetentionReport
from lorary.registry.measure.scores import CellScores
from lorary.registry.measure.thresholds import check_verdicts, judge, parse_threshold

STEPS = ("base", "general", "legal", "medicine")
SHARES = ("retention", "oracle_share")


def report_of(
    base: list[float],
    learned: list[float],
    now: list[float],
    alone: list[float] | None = None,
    right: Mapping[str, str] | None = None,
) -> RetentionReport:
    """A report in which texts of legal, of one byte each, have these bits; medicine and general stay as they are."""

    def cell(bits: list[float], asked: str = "") -> CellScores:
        nats = tuple(value * math.log(2) for value in bits)
        return CellScores(text_nats=nats, text_bytes=(1,) * len(bits), right=tuple(c == "+" for c in asked))

    flat, better = cell([2.0] * 30), cell([1.5] * 30)
    steps = [("base", base), ("general", base), ("learned", learned), ("now", now)]
    cells = {(i, 1): cell(bits, (right or {}).get(when, "")) for i, (when, bits) in enumerate(steps)}
    cells |= {(i, 0): flat for i in range(4)} | {(i, 2): better if i == 3 else flat for i in range(4)}
    scores = SimpleNamespace(
        steps=STEPS,
        columns=STEPS[1:],
        manifests=[SimpleNamespace(version=1, digest="sha256:0")] * 3,
        data=[SimpleNamespace(name=name, texts=(), questions=(), digest="sha256:1") for name in STEPS[1:]],
        cells=cells,
        alone=(flat, cell(learned if alone is None else alone, (right or {}).get("learned", "")), better),
        drift=(SimpleNamespace(domains=0, mean_kl=0.0, top1_flips=0),) * 2,
    )
    return RetentionReport(scores)  # type: ignore[arg-type]


def noise(texts: int, spread: float, seed: int = 0) -> list[float]:
    draw = np.random.default_rng(seed).normal(0, spread, texts)
    return (draw - draw.mean()).tolist()


HOPELESS = {
    "no gain": ([2.0] * 30, [2.0] * 30, [1.0] * 30),
    "a loss": ([2.0] * 30, [2.5] * 30, [1.0] * 30),
    "a loss that stays": ([2.0] * 30, [2.5] * 30, [2.5] * 30),
    "a tiny gain in noise": ([2.0] * 30, [1.999 + e for e in noise(30, 0.2)], [1.0] * 30),
    "rounding": ([2.0] * 30, [2.0 - 1e-7] * 30, [1.0] * 30),
    "one row": ([2.0], [1.0], [1.0]),
    "too few rows": ([2.0] * (MIN_TEXTS - 1), [1.0] * (MIN_TEXTS - 1), [1.0] * (MIN_TEXTS - 1)),
}


GATES = ["retention>=0.98", "retention<=100", "retention>-1000", "oracle_share>=0"]


@pytest.mark.parametrize("case", HOPELESS)
def test_a_share_of_noise_is_no_number_and_meets_no_threshold(case: str):
    report = report_of(*HOPELESS[case])

    for name in SHARES:
        value = report.figure(name).domains["legal"]
        assert (value.value, value.interval) == (None, None)
        assert value.reason
        document = json.loads(json.dumps(report.as_json(), allow_nan=False))["figures"][name]["domains"]["legal"]
        assert document == {"value": None, "interval": None, "reason": value.reason}
    verdicts = judge(report, [parse_threshold(gate) for gate in GATES])
    assert all(verdict.failed.keys() == {"legal"} for verdict in verdicts)
    with pytest.raises(GateFailedError, match="4 of 4"):
        check_verdicts(verdicts)
    assert report.figure("retention").whole.value == pytest.approx(1.0), "the mean is that of the others"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.floats(1e-9, 2), st.floats(-1, 1), st.integers(0, 9))
def test_a_share_is_a_number_only_where_its_gain_is_told_from_zero(texts: int, spread: float, gain: float, seed: int):
    learned = [3.0 - gain + e for e in noise(texts, spread, seed)]
    report = report_of([3.0] * texts, learned, learned)
    value = report.figure("retention").domains["legal"]

    if value.value is None:
        assert value.reason
        assert judge(report, [parse_threshold("retention>=-1")])[0].failed
    else:
        assert texts >= MIN_TEXTS
        assert gain >= MIN_GAIN * 3 * 0.999
        assert value.value == pytest.approx(1)


def test_a_chance_gain_is_rarely_a_share():
    """The error of the first kind, for the smallest number of texts that is measured at all."""
    draw = np.random.default_rng(0)
    found = [report_of([2.0] * 5, (2.0 + draw.normal(0, 0.2, 5)).tolist(), [2.0] * 5) for _ in range(25)]

    assert sum(one.figure("retention").domains["legal"].value is not None for one in found) <= 5


@pytest.mark.parametrize("learned", ["+" * 12, "+" * 6 + "-" * 6, "-" * 12], ids=["no gain", "a loss", "a large loss"])
def test_accuracies_without_a_gain_have_no_share(learned: str):
    texts = [2.0] * 12
    report = report_of(
        texts, texts, texts, right={"base": "+" * 12, "general": "+" * 12, "learned": learned, "now": "+" * 12}
    )

    assert report.figure("accuracy_retention").domains["legal"].reason
    assert judge(report, [parse_threshold("accuracy_retention>=0")])[0].failed == {"legal": None}


def test_what_does_not_apply_has_no_reason():
    report = report_of([2.0] * 9, [1.0] * 9, [1.0] * 9)

    assert report.figure("backward_transfer").domains["medicine"].reason is None
    assert judge(report, [parse_threshold("backward_transfer>=-0.1")])[0].checked == 1


def test_a_gain_that_is_not_a_number_is_not_measurable():
    assert why_not_measurable(math.nan, (0.1, 0.2), texts=50, base=2.0) == "the gain is not a number"
    assert why_not_measurable(0.5, None, texts=50, base=2.0)
    assert why_not_measurable(0.5, (math.nan, math.nan), texts=50, base=2.0)


def test_a_cell_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        CellScores(text_nats=(1.0, math.nan), text_bytes=(1, 1))


def test_a_model_whose_predictions_are_not_numbers_is_not_scored(whole: Any, texts: Any):
    import copy

    from lorary.domains.data.corpus import read_examples

    broken = copy.deepcopy(whole.base.model)
    next(iter(broken.parameters())).data.fill_(math.nan)

    with pytest.raises(IncompatibleError, match="not numbers") as caught:
        score_language(broken, whole.tokenizer, read_examples([texts["cooking"]]))

    assert "24 of 24 texts" in str(caught.value.cause)
    assert "--dtype float32" in str(caught.value.fix)


@pytest.mark.parametrize("alone", [1.0, 3.999])
def test_a_manifest_says_why_a_share_is_missing(alone: float):
    scores = DomainScores(
        base=4.0, alone=alone, routed=1.0, interval=(0.9, 1.1), bytes=9, share_reason="n = 1, and at least 5 are needed"
    )

    found = scores.as_json()

    assert found["share_of_oracle_gain"] is None
    assert found["share_reason"].startswith("n = 1")
    assert math.isnan(scores.share_of_oracle_gain)
