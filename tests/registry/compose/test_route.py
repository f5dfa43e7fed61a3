"""Routing of a text: slot gates, margin, and similarity to prototypes."""

from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.layer.active import SLOT_THRESHOLD
from lorary.domains.data.corpus import read_examples
from lorary.domains.errors import InputError
from lorary.registry import Registry
from lorary.registry.compose.build import read_packs
from lorary.registry.compose.route import RouteReport, route_text


@pytest.mark.parametrize("name", ["cooking", "sailing"])
def test_a_domain_takes_its_own_text(name: str, whole: Registry, texts: dict[str, Path]) -> None:
    text = " ".join(example.text for example in list(read_examples([texts[name]]))[:6])

    report = whole.route(text)

    assert report.taken_by == name
    assert max(report.similarity, key=lambda other: report.similarity[other]) == name


def test_gates_are_sorted_and_the_margin_is_between_the_first_two(whole: Registry) -> None:
    report = whole.route("butter and flour", raw=True)

    gates = list(report.gates.values())
    assert set(report.gates) == {"general", "cooking", "sailing"}
    assert gates == sorted(gates, reverse=True)
    assert sum(gates) == pytest.approx(1, abs=3 * SLOT_THRESHOLD)
    assert report.margin == pytest.approx(gates[0] - gates[1])
    assert report.taken_by == next(iter(report.gates))
    assert report.tokens == len(whole.tokenizer("butter and flour")["input_ids"])


def test_similarities_are_cosines_of_the_domains(whole: Registry) -> None:
    similarity = whole.route("keel").similarity

    assert set(similarity) == {"cooking", "sailing"}
    assert all(-1.001 <= value <= 1.001 for value in similarity.values())


def test_only_the_domains_of_the_composition_are_routed_to(whole: Registry) -> None:
    report = whole.route("mast and keel", "cooking")

    assert set(report.gates) == {"general", "cooking"}
    assert set(report.similarity) == {"cooking"}


def test_without_domains_everything_is_routed_to_general(kp_store: Path) -> None:
    report = Registry.open(kp_store).route("mast and keel")

    assert report.gates == {"general": 1.0}
    assert (report.taken_by, report.margin, report.similarity) == ("general", 1.0, {})


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_is_refused(text: str, whole: Registry) -> None:
    with pytest.raises(InputError, match="empty"):
        whole.route(text)


def test_a_static_composition_is_refused(whole: Registry) -> None:
    plan = whole.plan("cooking", static=True)

    with pytest.raises(InputError, match="does not route"):
        route_text(plan, read_packs(whole.store, plan), whole.base, "mast")


@pytest.mark.own_failure(
    "`route` of a text longer than the context",
    before="its beginning was routed",
    now="refused with both lengths, exit 2",
)
def test_a_text_beyond_the_context_is_refused_not_truncated(whole: Registry) -> None:
    length = whole.route("mast", raw=True).tokens - 1  # without the begin token

    assert whole.route("mast" * (511 // length), raw=True).tokens <= 512
    with pytest.raises(InputError, match="too long") as caught:
        whole.route("mast " * 2000)
    assert "context of 512" in str(caught.value.cause)


@pytest.mark.parametrize("text", [["mast"], 5, None, "mast \ud800", {"role": "user", "content": "mast"}])
def test_what_is_no_text_is_refused(text: Any, whole: Registry) -> None:
    with pytest.raises(InputError, match="The text (is of type|has a character)"):
        whole.route(text)


def test_routing_twice_gives_the_same(whole: Registry) -> None:
    assert whole.route("butter and keel") == whole.route("butter and keel")


def test_a_saved_composition_routes_without_the_packs_of_the_store(
    whole: Registry, kp_store: Path, tmp_path: Path
) -> None:
    folder = whole.save("cooking+sailing", tmp_path / "out")

    assert Registry.open(kp_store).route("mast and keel", str(folder)) == whole.route("mast and keel")


def test_a_report_shows_its_gates_and_escapes_names() -> None:
    report = RouteReport(
        gates={"<b>law</b>": 0.75, "general": 0.25},
        margin=0.5,
        taken_by="<b>law</b>",
        tokens=3,
        similarity={"<b>law</b>": 0.5},
    )

    assert repr(report) == "RouteReport(taken_by='<b>law</b>', margin=0.500, gates={<b>law</b>: 0.750, general: 0.250})"
    page = report._repr_html_()
    assert "<b>" not in page
    assert "<td>&lt;b&gt;law&lt;/b&gt;</td><td>0.750</td><td>0.50</td>" in page
    assert "<td>general</td><td>0.250</td><td></td>" in page
