"""`registry route`: which domain a text is routed to."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import Device, Dtype, Json, Raw, StorePath
from ..show import output
from ..show.numbers import exact, percent
from ..show.page import Page, Span, cell, fields, line, slot_style, table
from ..show.progress import show_progress
from ..show.slots import shares, similarity_cell
from ..startup import open_registry
from .pull import pull_named_packs

if TYPE_CHECKING:
    from ...registry.compose.route import RouteReport


def route(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to route.", show_default=False)],
    spec: Annotated[
        str | None, typer.Option("--in", metavar="SPEC", help="A composition.", show_default="all domains")
    ] = None,
    raw: Raw = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Show which domain a prompt is routed to, with the gate and the similarity of every domain.

    Example: registry route "The court finds for the claimant."
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = pull_named_packs(registry, spec, as_json=as_json) if spec else None
    with show_progress("loading the base model", as_json=as_json):
        report = registry.route(text, spec, raw=raw)
    output.show(route_page(report), command="route", as_json=as_json)


def route_page(report: "RouteReport") -> Page:
    """Make the page about the route of a text."""
    order = sorted(report.gates, key=lambda name: (name != GENERAL, name))
    bars = shares(report.gates, order, heading="GATE")
    rows = [
        (*row, similarity_cell(report.similarity.get(name))) for row, name in zip(bars.rows, report.gates, strict=True)
    ]
    listed = table((*bars.columns, "SIMILARITY"), rows, right=("GATE", "SIMILARITY"), no_wrap=bars.columns)
    slot = report.taken_by
    taken_by = "no domain: the base model and the KP bank answer" if slot == GENERAL else slot
    summary = fields(
        [
            ("taken by", cell(line(Span(taken_by, slot_style(order.index(slot)))), slot)),
            ("margin", cell(percent(report.margin, digits=1), exact(report.margin))),
            ("tokens", cell(str(report.tokens))),
            ("not routed", f"{', '.join(report.left_out)}: imported without text") if report.left_out else None,
        ]
    )
    return Page(data=asdict(report), blocks=(listed, summary))
