"""Kinds of text inside a domain: what an average hides is found, noise is not, and no text leaves with the names."""

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.data.example import Example
from lorary.domains.data.row_list import RowList
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import GateFailedError
from lorary.registry.learn.acceptance import AcceptanceCheck
from lorary.registry.measure.kinds import MAX_KINDS, kind_changes, portrait, rows_by_kind
from lorary.registry.measure.measurable import MIN_TEXTS
from lorary.registry.measure.report import RetentionReport
from lorary.registry.measure.scores import CellScores
from lorary.registry.measure.thresholds import check_verdicts, judge, parse_threshold

SIZE = 50


def rows(**counts: int) -> list[Example]:
    return [
        Example(completion=f"{kind} row {i} about {kind} matters", kind=kind)
        for kind, many in counts.items()
        for i in range(many)
    ]


def nats(examples: list[Example], spread: float = 0.0, seed: int = 0, **bits: float) -> list[float]:
    draw = np.random.default_rng(seed)
    each = [bits.get(example.kind or "", 1.0) + draw.normal(0, spread) for example in examples]
    return [value * math.log(2) * SIZE for value in each]


# --- which kinds there are ---


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"source": "faq"}, "faq"),
        ({"label": "spam"}, "spam"),
        ({"source": "faq", "label": "spam"}, "faq"),
        ({"label": 3}, "3"),
        ({"source": "/home/me/secret/notes.txt"}, "notes.txt"),
        ({"source": "  two \n words "}, "two words"),
        ({"source": "x" * 65, "label": "ok"}, "ok"),
        ({"source": ""}, None),
        ({"source": None}, None),
        ({"source": True}, None),
        ({"source": ["a"]}, None),
        ({"source": "a\x1b[31m"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_row_names_its_kind(row: dict[str, Any], kind: str | None):
    found = to_example(Row(1, {"text": "One two."} | row), "file")

    assert found.kind == kind
    assert found == to_example(Row(1, {"text": "One two."}), "file")
    assert found.digest() == Example(completion="One two.").digest()


def test_rows_in_memory_keep_their_kind():
    (line,) = RowList([{"text": "One.", "label": "faq"}]).to_jsonl().splitlines()

    assert to_example(Row(1, json.loads(line)), "file").kind == "faq"


def test_rows_of_one_kind_or_of_few_rows_are_not_told_apart():
    assert rows_by_kind(rows(faq=30)) == {}
    assert list(rows_by_kind(rows(faq=30, mail=MIN_TEXTS - 1))) == ["faq"]
    assert rows_by_kind(rows(**{f"k{i}": 1 for i in range(50)})) == {}
    assert len(rows_by_kind(rows(**{f"k{i}": 5 for i in range(MAX_KINDS + 9)}))) == MAX_KINDS


def test_rows_without_a_name_are_clustered_by_their_words_in_any_order():
    words = {"sea": ["mast", "keel", "rudder", "tide", "gale"], "oven": ["flour", "butter", "dough", "whisk", "glaze"]}
    draw = random.Random(0)
    texts = [Example(completion=" ".join(draw.choices(words[k], k=12))) for k in ("sea", "oven") for _ in range(12)]
    shuffled = random.Random(1).sample(texts, len(texts))

    found = rows_by_kind(texts)

    assert {kind: {i < 12 for i in members} for kind, members in found.items()} in (
        {"cluster 1": {True}, "cluster 2": {False}},
        {"cluster 1": {False}, "cluster 2": {True}},
    )
    assert {kind: {shuffled[i].text for i in members} for kind, members in rows_by_kind(shuffled).items()} == {
        kind: {texts[i].text for i in members} for kind, members in found.items()
    }


# --- what an average hides ---


def test_harm_to_one_kind_is_found_though_the_average_is_better():
    texts = rows(mail=90, faq=10)
    before, now = nats(texts, 0.05), nats(texts, 0.05, mail=0.95, faq=1.12)
    check = AcceptanceCheck(
        parent=sum(before), new=sum(now), bytes=1, data="", tolerance=0.005,
        kinds=kind_changes(texts, before, now, [SIZE] * 100),
    )  # fmt: skip

    assert check.new < check.parent
    assert [kind.kind for kind in check.failing] == ["faq"]
    assert check.failing[0].change == pytest.approx(0.12, abs=0.04)
    assert not check.holds
    record = json.dumps(check.described(texts).as_json(), allow_nan=False)
    assert not any(word in record for word in ("about", "matters"))
    again = AcceptanceCheck.from_json(json.loads(record), tolerance=0.5)
    assert again.holds
    assert [kind.kind for kind in again.kinds] == ["faq", "mail"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(MIN_TEXTS, 40), st.floats(0.01, 0.5))
def test_noise_alone_seldom_fails_a_kind(seed: int, many: int, spread: float):
    texts = rows(mail=many, faq=many)
    before, now = nats(texts, spread, seed), nats(texts, spread, seed + 1)

    for one in kind_changes(texts, before, now, [SIZE] * len(texts)):
        assert one.interval[0] <= one.change <= one.interval[1]
        if one.is_worse(0.005):
            assert one.change > 0.005
            assert one.interval[0] > 0


def test_scores_of_before_that_are_without_kinds_are_read():
    found = AcceptanceCheck.from_json({"parent": 1.0, "new": 1.0, "bytes": 9, "data": ""}, tolerance=0.0)

    assert found.holds
    assert "kinds" not in found.as_json()


def test_a_kind_is_recognized_by_its_words_and_its_worst_rows():
    texts = rows(mail=20, faq=10)

    found = portrait(texts, "faq", [float(i) for i in range(30)])

    assert {"faq row", "faq matters"} <= set(found.words)
    assert not any("mail" in word for word in found.words)
    assert found.examples[0] == "faq row 9 about faq matters"
    assert len(found.examples) == 3


# --- the report ---


def report_of(texts: list[Example], learned: dict[str, float], now: dict[str, float], spread: float = 0.02):
    def cell(seed: int, **bits: float) -> CellScores:
        return CellScores(text_nats=tuple(nats(texts, spread, seed, **bits)), text_bytes=(SIZE,) * len(texts))

    base, old, new = cell(0, mail=2.0, faq=2.0), cell(1, **learned), cell(2, **now)
    steps = ("base", "general", "legal", "medicine")
    cells = {(i, j): base for i in range(4) for j in range(3)} | {(2, 1): old, (3, 1): new, (3, 2): old}
    data = [SimpleNamespace(name=name, texts=(), questions=(), digest="") for name in steps[1:]]
    data[1].texts = tuple(texts)
    scores: Any = SimpleNamespace(
        steps=steps,
        columns=steps[1:],
        manifests=[SimpleNamespace(version=1, digest="")] * 3,
        data=data,
        cells=cells,
        alone=(base, old, old),
        drift=(SimpleNamespace(domains=0, mean_kl=0.0, top1_flips=0),) * 2,
    )
    return RetentionReport(scores)


@pytest.mark.parametrize("gate", ["retention>=0.9", "backward_transfer>=-0.05", "oracle_share>=0.9"])
def test_a_gate_looks_at_each_kind(gate: str):
    report = report_of(rows(mail=90, faq=10), {"mail": 1.0, "faq": 1.0}, {"mail": 0.98, "faq": 1.3})

    verdicts = judge(report, [parse_threshold(gate)])

    assert list(verdicts[0].failed) == ["legal: faq"]
    with pytest.raises(GateFailedError) as caught:
        check_verdicts(verdicts)
    assert "legal: faq is" in str(caught.value.cause)
    assert "registry compose legal;" in str(caught.value.fix)
    assert report.kind_changes[0].words == "worse: +29.9 % bits, most with + medicine, n = 10"
    found = report.portrait("legal: faq")
    assert (found.kind, len(found.examples)) == ("legal: faq", 3)
    assert "matters" not in json.dumps(report.as_json())


def test_a_kind_that_gained_nothing_fails_if_it_is_harmed():
    report = report_of(rows(mail=90, faq=10), {"mail": 1.0, "faq": 2.0}, {"mail": 0.98, "faq": 2.4})

    (verdict,) = judge(report, [parse_threshold("retention>=0.9")])

    assert verdict.failed == {"legal: faq": None}
    assert verdict.reasons["legal: faq"].startswith("worse: +")


@pytest.mark.parametrize("gate", ["retention>=0.9", "average_score<1.05"])
def test_kinds_that_are_kept_or_differ_from_each_other_fail_nothing(gate: str):
    report = report_of(rows(mail=90, faq=10), {"mail": 1.0, "faq": 1.3}, {"mail": 1.0, "faq": 1.3})

    assert "legal: faq" not in judge(report, [parse_threshold(gate)])[0].failed


def test_a_domain_of_one_kind_has_no_kinds():
    report = report_of(rows(mail=30), {"mail": 1.0}, {"mail": 1.0})

    assert report.kinds is None
    assert report.as_json()["kinds"] == []
