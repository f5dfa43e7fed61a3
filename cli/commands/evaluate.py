"""`registry evaluate`: scores of the domains of a composition on held-out text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..options import Data, Device, Dtype, Json, NoQuestions, Spec, StorePath
from ..show import facts, output
from ..show.numbers import exact, percent, plural
from ..show.page import Block, Cell, Page, Paragraph, Span, Table, cell, fields, line, table
from ..show.progress import show_progress
from ..startup import open_registry
from .pull import pull_named_packs

if TYPE_CHECKING:
    from ...registry.compose.plan import Plan
    from ...registry.measure.evaluate import DomainScores


def evaluate(
    spec: Spec,
    data: Data = None,
    no_questions: NoQuestions = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Evaluate every domain of a composition on its held-out text: base model, its own experts alone, and routed.

    For a composition of one domain, --data replaces the text that was held out when the domain was added.

    Example: registry evaluate medicine+legal
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = pull_named_packs(registry, spec, as_json=as_json)
    plan = registry.plan(spec)
    with show_progress("loading the base model", as_json=as_json) as progress:
        scores = registry.evaluate(spec, data=data, questions=not no_questions, on_progress=progress.on_progress)
    output.show(evaluation_page(plan, scores), command="evaluate", as_json=as_json)


def evaluation_page(plan: "Plan", scores: "dict[str, DomainScores]") -> Page:
    """Make the page of a composition's scores."""
    columns = (*facts.SCORES, "95 % OF GAIN", "ROUTED RIGHT")
    listed = table(columns, [_row(name, found) for name, found in scores.items()], right=columns[1:], no_wrap=columns)
    accuracies = {name: found.accuracy for name, found in scores.items() if found.accuracy}
    text = sum(found.bytes for found in scores.values())
    about = fields([("composition", cell(plan.pinned)), ("held-out text", cell(plural(text, "byte"), text))])
    data = {
        "composition": str(plan.composition),
        "pinned": plan.pinned,
        "domains": {name: found.as_json() for name, found in scores.items()},
    }
    blocks: list[Block] = [about, listed, *([_question_table(accuracies)] if accuracies else [])]
    reasons = {name: found.share_reason for name, found in scores.items() if found.share_reason}
    blocks += [Paragraph(line(Span(not_measurable(reasons), "warn")), in_pipes=False)] if reasons else []
    return Page(data=data, blocks=tuple(blocks))


def not_measurable(reasons: Mapping[str, str]) -> str:
    """Say which shares are not measurable, a line each."""
    return "\n".join(f"{name}: the share of oracle gain is not measurable: {why}." for name, why in reasons.items())


def _row(name: str, found: "DomainScores") -> list[Cell]:
    scores = found.as_json()
    return [
        *facts.score_row(name, scores),
        _share_interval(found.share_interval),
        cell(percent(found.routed_right), exact(found.routed_right)),
    ]


def _share_interval(interval: "tuple[float, float] | None") -> Cell:
    if interval is None:
        return cell("-", "")
    low, high = interval
    return cell(f"{low * 100:.0f}–{high * 100:.0f} %", f"{exact(low)} {exact(high)}")


def _question_table(accuracies: dict[str, dict[str, Any]]) -> Table:
    """Make the table of accuracies: base model, own experts alone, and routed with its interval."""
    rows = []
    for name, accuracy in accuracies.items():
        routed = accuracy["routed"]
        shares = [accuracy[model]["accuracy"] for model in ("base", "alone", "routed")]
        rows.append(
            [
                cell(name),
                *(cell(percent(share), exact(share)) for share in shares),
                _share_interval(routed["interval"]),
                cell(f"{routed['correct']} of {routed['total']}"),
            ]
        )
    columns = ("QUESTIONS", "BASE", "OWN EXPERTS", "ROUTED", "95 %", "RIGHT")
    return table(columns, rows, right=columns[1:], no_wrap=columns)
