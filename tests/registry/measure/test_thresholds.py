"""Thresholds: a small strict grammar, and the verdict over domains."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.errors import GateFailedError, InputError
from lorary.registry.measure.report import Figure, Value
from lorary.registry.measure.thresholds import Threshold, Verdict, _judge, check_verdicts, parse_threshold


def figure(unit: str = "share", whole: float | None = 0.9, **domains: float | None) -> Figure:
    values = {name: Value(value=value) for name, value in domains.items()}
    about: Any = {"title": "t", "formula": "f", "source": "s", "meaning": "m"}
    return Figure(name="retention", unit=unit, whole=Value(value=whole), domains=values, **about)


@given(st.sampled_from([">=", "<=", ">", "<"]), st.decimals(-100, 100, places=4), st.sampled_from(["", " "]))
def test_parsing_and_formatting_round_trip(operator: str, bound, space: str):
    found = parse_threshold(f"{space}retention{space}{operator}{space}{bound}")

    assert found == Threshold(name="retention", operator=operator, bound=float(bound))
    assert parse_threshold(str(found)) == Threshold(name="retention", operator=operator, bound=float(bound))


@pytest.mark.parametrize(
    "text",
    ["", "retention", "retention=0.9", "retention==0.9", "0.9<=retention", "retention>=nan", "retention>=0.9%",
     "retention>=0.9 retention>=0.8", "retention>=1e9", "__import__('os')>=1", "retention>=.", "Retention>=1"],
)  # fmt: skip
def test_a_text_that_violates_the_grammar_is_refused(text: str):
    with pytest.raises(InputError, match="is not a threshold") as caught:
        parse_threshold(text)

    assert "retention>=0.98" in str(caught.value.fix)


def test_an_unknown_figure_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no figure 'retension'") as caught:
        parse_threshold("retension>=0.9")

    assert "oracle_share" in str(caught.value.cause)


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("retention>=0.9", {"b": 0.8}),
        ("retention>0.8", {"b": 0.8}),
        ("retention<=0.8", {"a": 0.9}),
        ("retention<2", {}),
    ],
)
def test_every_domain_must_meet_the_threshold(text: str, failed: dict):
    verdict = _judge(figure(a=0.9, b=0.8), parse_threshold(text))

    assert (verdict.failed, verdict.holds, verdict.checked) == (failed, not failed, 2)


@pytest.mark.parametrize("text", ["retention>=0.1", "retention<=2", "retention>-5"])
def test_a_share_that_is_not_measurable_fails_every_threshold(text: str):
    found = figure(a=0.9, b=None)
    found = replace(found, domains={**found.domains, "b": Value(value=None, reason="no gain")})

    verdict = _judge(found, parse_threshold(text))

    assert (verdict.failed, verdict.reasons, verdict.held) == ({"b": None}, {"b": "no gain"}, ("a",))
    with pytest.raises(GateFailedError, match="1 of 1") as caught:
        check_verdicts([verdict])
    assert caught.value.cause == "retention of b is not measurable (no gain)"
    assert "registry report --domains a" in str(caught.value.fix)


@pytest.mark.parametrize("unit", ["bits/byte", "share"])
def test_a_domain_that_a_figure_does_not_apply_to_is_skipped(unit: str):
    verdict = _judge(figure(unit, a=0.9, b=None), parse_threshold("retention>=0.1"))

    assert (verdict.holds, verdict.checked) == (True, 1)


def test_a_figure_without_domains_is_judged_as_a_whole():
    assert _judge(figure(), parse_threshold("retention>=0.95")).failed == {"retention": 0.9}


@given(st.sampled_from([">=", "<=", ">", "<"]), st.lists(st.floats(-50, 50), min_size=1, max_size=4), st.floats(-9, 9))
def test_the_printed_thresholds_are_met_by_what_was_measured(operator: str, values: list[float], bound: float):
    found = figure("share", 0.9, **{f"d{i}": value for i, value in enumerate(values)})
    verdict = _judge(found, Threshold(name="retention", operator=operator, bound=bound))
    if verdict.holds:
        return

    with pytest.raises(GateFailedError) as caught:
        check_verdicts([verdict])
    (printed,) = re.findall(r'--gate "(.+?)"', str(caught.value.fix))

    assert _judge(found, parse_threshold(printed)).holds


def test_an_unmet_threshold_names_domains_and_values():
    thresholds = [parse_threshold("retention>=0.5"), parse_threshold("retention>=0.98")]
    verdicts = [
        Verdict(threshold=thresholds[0], failed={}, checked=2),
        Verdict(threshold=thresholds[1], failed={"medicine": 0.8668, "legal": None}, checked=2),
    ]

    with pytest.raises(GateFailedError, match="1 of 2 thresholds were not met: retention>=0.98") as caught:
        check_verdicts(verdicts)

    assert caught.value.exit_code == 9
    assert caught.value.cause == "retention of medicine is 0.8668, legal is undefined"
    check_verdicts(verdicts[:1])
