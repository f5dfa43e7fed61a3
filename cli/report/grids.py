"""Grids of the HTML report: the cells of heat maps, of the routing confusion, and of experts by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..show.numbers import percent
from .formatting import format_count, format_interval, format_step, format_value, heat_levels, score_unit, worse_columns

if TYPE_CHECKING:
    from ...registry.measure.report import RetentionReport, ScoreTable
    from ...registry.measure.report_details import ReportDetails

MAX_COLUMNS: Final = 12  # a heat map with more columns shows colours only: the values are in its tooltips
MAX_LAYERS: Final = 40  # the same for the grid of decoder layers
HEAT_LEVELS: Final = 9  # classes h0 ... h8 of report.css
TINTS: Final = 5  # classes r1 ... r5 (right), w1 ... w5 (wrong) and e1 ... e5 (experts)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A small bar chart in a cell."""

    path: str
    width: int


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One cell: its text, its CSS classes, and what its tooltip adds."""

    text: str = ""
    style: str = ""
    tip: str = ""
    bars: Bars | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column heading, with a note that the tooltips of its cells repeat."""

    title: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells by row and column."""

    name: str
    corner: str  # heading of the column of row titles
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[GridCell]]]
    is_wide: bool
    style: str = ""


def heat_grid(report: "RetentionReport", scores: "ScoreTable", name: str) -> Grid:
    """Build the heat map of a retention matrix: a row for each step, a column for each domain."""
    matrix = scores.matrix
    worse = worse_columns(report, scores)
    levels = [heat_levels(scores, j, levels=HEAT_LEVELS) for j in range(len(matrix.domains))]
    rows = [
        (format_step(i, step), [_heat_cell(scores, i, j, column[i], worse) for j, column in enumerate(levels)])
        for i, step in enumerate(matrix.steps)
    ]
    columns = [Column(title=domain, note=format_count(scores.counts[domain])) for domain in matrix.domains]
    return Grid(name=name, corner="after", columns=columns, rows=rows, is_wide=len(columns) > MAX_COLUMNS)


def _heat_cell(scores: "ScoreTable", step: int, column: int, level: int | None, worse: set[int]) -> GridCell:
    if level is None:
        return GridCell()
    unit, matrix = score_unit(scores), scores.matrix
    is_worse = step == matrix.last and column in worse
    tip = f"95 % {format_interval(scores.intervals[step][column], unit)}"
    return GridCell(
        text=format_value(scores.value(step, column), unit),
        style=f"h{level}{' own' * (step == matrix.learned[column])}{' worse' * is_worse}",
        tip=f"{tip}, worse" if is_worse else tip,
    )


def confusion_grid(report: "RetentionReport") -> Grid:
    """Build the routing confusion: held-out texts by true domain and by the slot with most of their gate."""
    rows = [(true, [_confusion_cell(report, true, slot) for slot in report.columns]) for true in report.columns]
    columns = [Column(title=name) for name in report.columns]
    name = "Routing of held-out texts"
    return Grid(name=name, corner="texts of", columns=columns, rows=rows, is_wide=len(columns) > MAX_COLUMNS)


def _confusion_cell(report: "RetentionReport", true: str, slot: str) -> GridCell:
    texts = sum(report.confusion[true].values())
    count, gate = report.confusion[true].get(slot, 0), report.mean_gates[true].get(slot, 0.0)
    if not count:
        return GridCell(tip=_mean_gate(gate) if gate >= 0.0005 else "")
    tint = max(1, round(count / texts * TINTS))
    return GridCell(text=str(count), style=f"{'r' if slot == true else 'w'}{tint}", tip=_mean_gate(gate))


def _mean_gate(gate: float) -> str:
    return f"mean gate {percent(gate, digits=1)}"


def layers_grid(details: "ReportDetails") -> Grid:
    """Build the grid of decoder layers: the number of experts, and a bar for each with the height of its mean gate."""
    depth = max(len(layers) for layers in details.gates.values())
    max_experts = max(len(gates) for layers in details.gates.values() for gates in layers)
    max_gate = max(gate for layers in details.gates.values() for gates in layers for gate in gates)
    rows = [
        (name, [_layer_cell(gates, max_experts, max_gate) for gates in layers])
        for name, layers in details.gates.items()
    ]
    columns = [Column(title=str(index)) for index in range(depth)]
    name = "Experts by decoder layer"
    return Grid(name=name, corner="layer", columns=columns, rows=rows, is_wide=depth > MAX_LAYERS, style="layers")


def _layer_cell(gates: Sequence[float], max_experts: int, max_gate: float) -> GridCell:
    if not gates:
        return GridCell(style="none")
    path = "".join(f"M{4 + 7 * i} 30v-{max(1, round(gate / max_gate * 28))}" for i, gate in enumerate(gates))
    return GridCell(
        text=str(len(gates)),
        style=f"e{max(1, round(len(gates) / max_experts * TINTS))}",
        tip=f"mean gates {' '.join(f'{gate:.2f}' for gate in gates)}",
        bars=Bars(path=path, width=7 * len(gates) + 1),
    )
