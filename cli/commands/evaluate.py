"""`registry route` and `evaluate`: where a text goes, and how well each domain is predicted."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...adapters.composition import GENERAL
from ..options import Data, Device, Dtype, Json, NoQuestions, Spec, StorePath, sources
from ..show import facts as of
from ..show import output
from ..show.numbers import exact, percent, plural
from ..show.page import Cell, Page, Span, Table, cell, facts, line, slot_style, table
from ..show.slots import shares, similarity_cell
from ..show.watch import watch
from ..startup import open_registry
from .pull import localised

if TYPE_CHECKING:
    from ...registry.compose.plan import Plan
    from ...registry.compose.route import RouteReport
    from ...registry.measure.evaluate import DomainScores


def route(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to route.", show_default=False)],
    spec: Annotated[
        str | None, typer.Option("--in", metavar="SPEC", help="A composition.", show_default="all domains")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Show which domain would take a text, by how much, and which domains it is like.

    Example: registry route "The court finds for the claimant."
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = localised(registry, spec, as_json=as_json) if spec else None
    with watch("loading the base model", as_json=as_json):
        report = registry.route(text, spec)
    output.show(route_page(report), command="route", as_json=as_json)


def route_page(report: "RouteReport") -> Page:
    """Where the text goes."""
    order = sorted(report.gates, key=lambda name: (name != GENERAL, name))
    bars = shares(report.gates, order, heading="GATE")
    rows = [
        (*row, similarity_cell(report.similarity.get(name))) for row, name in zip(bars.rows, report.gates, strict=True)
    ]
    listed = table((*bars.columns, "SIMILARITY"), rows, right=("GATE", "SIMILARITY"), tight=bars.columns)
    taker = report.taken_by
    meaning = "no domain takes it: the base and KP answer" if taker == GENERAL else taker
    summary = facts(
        [
            ("taken by", cell(line(Span(meaning, slot_style(order.index(taker)))), taker)),
            ("margin", cell(percent(report.margin, digits=1), exact(report.margin))),
            ("tokens", cell(str(report.tokens))),
        ]
    )
    return Page(data=asdict(report), blocks=(listed, summary))


def evaluate(
    spec: Spec,
    data: Data = None,
    no_questions: NoQuestions = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Score every domain of a composition on its held-out text: the base, its own experts alone, and routed.

    --data gives held-out text for a composition of one domain, instead of what was held out when it was added.

    Example: registry evaluate medicine+legal
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = localised(registry, spec, as_json=as_json)
    plan = registry.plan(spec)
    with watch("loading the base model", as_json=as_json) as watching:
        scores = registry.evaluate(
            spec, data=sources(data), questions=not no_questions, on_progress=watching.on_progress
        )
    output.show(evaluation_page(plan, scores), command="evaluate", as_json=as_json)


def evaluation_page(plan: "Plan", scores: "dict[str, DomainScores]") -> Page:
    """The scores of a composition."""
    columns = (*of.SCORES, "95 % OF GAIN", "ROUTED RIGHT")
    listed = table(columns, [_row(name, found) for name, found in scores.items()], right=columns[1:], tight=columns)
    asked = {name: found.accuracy for name, found in scores.items() if found.accuracy}
    text = sum(found.bytes for found in scores.values())
    explained = facts([("composition", cell(plan.pinned)), ("held-out text", cell(plural(text, "byte"), text))])
    data = {
        "composition": str(plan.composition),
        "pinned": plan.pinned,
        "domains": {name: found.as_json() for name, found in scores.items()},
    }
    return Page(data=data, blocks=(explained, listed, *([_questions(asked)] if asked else [])))


def _row(name: str, found: "DomainScores") -> list[Cell]:
    scores = found.as_json()
    return [
        *of.score_row(name, scores),
        _shares(found.share_interval),
        cell(percent(found.routed_right), exact(found.routed_right)),
    ]


def _shares(interval: "tuple[float, float] | None") -> Cell:
    """An interval of shares of 1."""
    if interval is None:
        return cell("-", "")
    low, high = interval
    return cell(f"{low * 100:.0f}–{high * 100:.0f} %", f"{exact(low)} {exact(high)}")


def _questions(asked: dict[str, dict[str, Any]]) -> Table:
    """How many questions are answered right: by the base, the own experts alone, and routed with its interval."""
    rows = []
    for name, accuracy in asked.items():
        routed = accuracy["routed"]
        shares = [accuracy[model]["accuracy"] for model in ("base", "alone", "routed")]
        rows.append(
            [
                cell(name),
                *(cell(percent(share), exact(share)) for share in shares),
                _shares(routed["interval"]),
                cell(f"{routed['correct']} of {routed['total']}"),
            ]
        )
    columns = ("QUESTIONS", "BASE", "OWN EXPERTS", "ROUTED", "95 %", "RIGHT")
    return table(columns, rows, right=columns[1:], tight=columns)
