"""The HTML report, parsed back: complete, harmless whatever names say, and small with a hundred domains."""

import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorary.cli.report.html import PageSource, content_policy, retention_html
from lorary.domains.data.example import Example
from lorary.registry import Registry
from lorary.registry.compose.drift import Drift
from lorary.registry.maintenance.log import LogEntry
from lorary.registry.measure.held_out import HeldOut
from lorary.registry.measure.report import RetentionReport, RetentionScores
from lorary.registry.measure.report_details import ReportDetails
from lorary.registry.measure.retention import measured_cells
from lorary.registry.measure.scores import CellScores
from lorary.registry.measure.thresholds import judge, parse_threshold

HOSTILE = "</td></script><img src=x onerror=alert(1)>\"'&<b style=x>\x00\u202e"


class Reader(HTMLParser):
    """What a parser sees."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}  # by element
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open[-1:]:
            self.text[tag] = self.text.get(tag, "") + "\n" + data


@pytest.fixture(scope="module")
def page_of(store: Path) -> Callable[..., PageSource]:
    """`page_of(3, description="..")` is the source of a page about so many domains, with numbers made by hand."""
    registry = Registry.open(store)
    pattern = registry.show("medicine")

    def cell(bits: float, name: str) -> CellScores:
        sizes = (100, 200, 300, 100, 200, 300)
        nats = tuple(bits * (1 + k / 50) * math.log(2) * size for k, size in enumerate(sizes))
        return CellScores(
            text_nats=nats,
            text_bytes=sizes,
            right=(True, False, True),
            taken={name: 3},
            gates={name: 0.9, "general": 0.1},
        )

    def make(domains: int, *, layers: int = 4, description: str = "Text.", **changes: Any) -> PageSource:
        names = ["general", *(f"domain-{i:03}" for i in range(domains))]
        manifests = tuple(replace(pattern, name=name, description=description) for name in names)
        scores = RetentionScores(
            steps=("base", *names),
            manifests=manifests,
            data=tuple(
                HeldOut(name=name, texts=tuple(Example(completion=f"{name} {k}") for k in range(3))) for name in names
            ),
            cells={(i, j): cell(2.0 if i <= j else 1.0 + 0.001 * i, names[j]) for i, j in measured_cells(domains)},
            alone=tuple(cell(0.99, name) for name in names),
            drift=tuple(Drift(1e-6, 0, 0.0, i) for i in range(domains)),
        )
        draw = np.random.default_rng(0)
        details = ReportDetails(
            places={name: draw.normal(size=(16, 2)) for name in names},
            explained=(0.3, 0.2),
            gates={name: tuple((0.7, 0.2, 0.1)[: 1 + i % 3] if i else () for i in range(layers)) for name in names},
        )
        entry = LogEntry(
            name="",
            version=1,
            aliases=["latest"],
            parent=None,
            mode=None,
            held_back=False,
            removed=None,
            bits_per_byte=None,
            gate=None,
            created="2026-01-02T03:04:05+00:00",
            digest="",
        )
        history = {name: [replace(entry, name=name)] for name in names}
        report = RetentionReport(scores, left_out=changes.pop("left_out", {}))
        return PageSource(
            report=report,
            verdicts=judge(report, [parse_threshold("retention>=0.5"), parse_threshold("average_score<1")]),
            details=details,
            history=history,
            base=replace(registry.base_record, **changes),
            created="2026-01-02T03:04:05+00:00",
            version="0.1.0",
        )

    return make


def test_the_page_is_well_formed_and_names_nothing_outside_itself(page_of: Any):
    read = Reader(retention_html(page_of(3)))

    assert read.open == []
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "audio", "video"}
    outside = {"src", "srcset", "action", "data", "poster", "xlink:href", "style", "background"}
    for tag, attributes in read.elements:
        assert not outside & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert "url(" not in read.text["style"]
    assert "@import" not in read.text["style"]
    assert [tag for tag, _ in read.elements if tag in ("style", "script")] == ["style", "script"]


def test_the_policy_of_the_page_names_its_style_and_script(page_of: Any):
    read = Reader(retention_html(page_of(1)))

    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == content_policy(style=read.text["style"].strip("\n") + "\n", script=read.text["script"][1:])


def test_everything_that_was_measured_is_there(page_of: Any):
    source = page_of(3)

    page = retention_html(source)

    text = "\n".join(Reader(page).text.values())
    for figure in source.report.figures:
        assert figure.title in text
        assert figure.meaning in text
        assert figure.formula in text
    ids = {attributes.get("id") for _, attributes in Reader(page).elements}
    sections = {"summary", "matrix", "domains", "routing", "prototypes", "layers", "versions", "data", "formulas"}
    assert ids >= sections
    assert "Chaudhry et al. 2018, arXiv 1801.10112" in page
    assert "1 of 2 thresholds failed" in page
    assert "registry report --domains domain-000@1,domain-001@1,domain-002@1" in page


def test_links_lead_somewhere(page_of: Any):
    read = Reader(retention_html(page_of(2)))

    targets = {(a["href"] or "")[1:] for tag, a in read.elements if tag == "a"}
    ids = [a["id"] for _, a in read.elements if a.get("id")]
    assert targets <= set(ids)
    assert len(ids) == len(set(ids))


def test_hostile_words_add_no_element(page_of: Any):
    plain = Reader(retention_html(page_of(2, description="Text.", id="base", left_out={"gone": "why"})))

    hostile = Reader(retention_html(page_of(2, description=HOSTILE, id=HOSTILE, left_out={"gone": HOSTILE})))

    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    attributes = [set(attributes) for _, attributes in hostile.elements]
    assert attributes == [set(attributes) for _, attributes in plain.elements]
    assert "onerror" in hostile.text["td"], "it is there, as text"
    assert "\x00" not in "".join(hostile.text.values())
    assert "\u202e" not in "".join(hostile.text.values())


def test_a_column_shows_what_a_cell_says(page_of: Any):
    source = page_of(2)

    read = Reader(retention_html(source))

    last = source.report.bits.value(3, 2)
    low, high = source.report.bits.intervals[3][2]
    cells = [
        attributes for tag, attributes in read.elements if tag == "td" and "own" in (attributes.get("class") or "")
    ]
    assert f"95 % {low:.3f}–{high:.3f}" in [attributes["data-t"] for attributes in cells]
    assert f"\n{last:.3f}" in read.text["td"]


def test_a_hundred_domains_fit_into_two_megabytes(page_of: Any):
    page = retention_html(page_of(100, layers=32))

    assert len(page.encode()) < 2_000_000
    assert Reader(page).open == []


def test_one_domain_without_any_gain_is_a_page_too(page_of: Any):
    source = page_of(1)
    flat = {place: replace(cell, right=()) for place, cell in source.report.scores.cells.items()}
    same = next(iter(flat.values()))
    scores = replace(source.report.scores, cells=dict.fromkeys(flat, same), alone=(same, same))

    page = retention_html(replace(source, report=RetentionReport(scores), verdicts=[]))

    assert Reader(page).open == []
    assert "nan" not in page.lower()


def test_of_many_domains_only_retrained_ones_have_a_lineage(page_of: Any):
    source = page_of(30)
    first = source.history["domain-007"][0]
    newer = replace(first, version=2, parent=1, mode="extend", aliases=[], held_back=True)
    history = {**source.history, "domain-007": [first, newer]}

    page = retention_html(replace(source, history=history))

    lineage = page[page.index('id="versions"') : page.index('id="data"')]
    assert "Left out: 30 domains with a single version" in lineage
    assert ">extend</text>" in lineage
    assert ">held back</text>" in lineage
    assert "domain-007@2, 2026-01-02" in lineage
    assert "domain-008" not in lineage
    assert "Left out: 31 domains" in retention_html(source)


def test_what_another_domain_harmed_is_red_and_said(page_of: Any, harmed: RetentionReport):
    source = page_of(2)
    harmed.scores.manifests = source.report.scores.manifests  # type: ignore[misc]
    page = retention_html(replace(source, report=harmed, verdicts=judge(harmed, [parse_threshold("retention>=0.98")])))

    assert '<span class="pill bad">2 scores worse</span>' in page
    assert '<span class="pill bad">worse: +54 % bits, most with + legal</span>' in page
    assert '<td class="h4 worse" data-t="95 % 1.540–1.540, worse">1.540</td>' in page
    assert page.count("not measurable") >= 4
    assert "there is no gain over the base" in page
    assert "medicine 0.460, legal not measurable" in page
