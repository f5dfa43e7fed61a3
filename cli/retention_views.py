"""How a retention report is shown in a terminal: heat maps, what became of each domain, figures with formulas."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .charts import HEAT_LEVELS, heat
from .numbers import bits, exact, percent
from .page import Block, Cell, Span, Table, cell, faint, line, table, title

if TYPE_CHECKING:
    from ..registry.retention_report import Figure, Interval, RetentionReport, ScoreTable, Value
    from ..registry.thresholds import Verdict

WIDE = 10  # columns from which a heat map shows levels instead of scores, for people


def heat_table(scores: "ScoreTable", *, heading: str = "STEP") -> Table:
    """The retention matrix: a row for each step, a column for each domain, dark where it is predicted best."""
    matrix, is_wide = scores.matrix, len(scores.matrix.domains) > WIDE
    names = [f"{j}" if is_wide else name for j, name in enumerate(matrix.domains)]
    levels = [heat_levels(scores, j, levels=HEAT_LEVELS) for j in range(len(names))]
    rows = []
    for i, step in enumerate(matrix.steps):
        cells = [_heat_cell(scores, i, j, levels[j][i], is_wide=is_wide) for j in range(len(names))]
        rows.append([cell(f"{'' if i == 0 else '+ '}{step}", step), *cells])
    headings = (heading, *names)
    return table(headings, rows, right=names, tight=headings)


def heat_levels(scores: "ScoreTable", column: int, *, levels: int) -> list[int | None]:
    """How far each step's score is from its column's best, 0 for the best; None where nothing was measured.

    A column whose scores hardly differ has no dark cells: its colours span at least 5 % of its worst bits per byte, or
    20 points of accuracy.
    """
    is_lower = scores.matrix.lower_is_better
    values = [scores.value(i, column) for i in range(len(scores.matrix.steps))]
    losses = [None if value is None else value if is_lower else -value for value in values]
    known = [loss for loss in losses if loss is not None]
    least = max(known) / 20 if is_lower else 0.2
    return [None if loss is None else heat(loss, known, levels=levels, least=least) for loss in losses]


def _heat_cell(scores: "ScoreTable", step: int, column: int, level: int | None, *, is_wide: bool) -> Cell:
    value = scores.value(step, column)
    if value is None:
        return cell(faint(" · "), "")
    text = str(level) if is_wide else bits(value) if scores.matrix.lower_is_better else percent(value)
    return cell(Span(f" {text} ", f"heat{level}"), exact(value))


def domains_table(report: "RetentionReport") -> Table:
    """What became of each domain: when it was learned, and after the last step."""
    figures = {figure.name: figure for figure in report.figures}
    columns = ["DOMAIN", "BASE", "LEARNED", "NOW", "95 %", "KEPT", "ORACLE GAIN", "95 %", "ROUTED RIGHT"]
    has_questions = report.accuracy is not None
    columns += ["RIGHT BEFORE", "RIGHT NOW", "95 %"] if has_questions else []
    rows = []
    for j, name in enumerate(report.columns):
        interval = report.bits.intervals[-1][j]
        share = figures["oracle_share"].domains.get(name)
        row = [
            cell("general text" if j == 0 else name, name),
            *(_number(report.bits.value(i, j)) for i in (0, j + 1, len(report.steps) - 1)),
            _interval(interval, "bits/byte"),
            _shown(figures["retention"].domains.get(name), "share"),
            _shown(share, "share"),
            _interval(share and share.interval, "share"),
            _shown(figures["routing_accuracy"].domains[name], "share"),
        ]
        rows.append(row + (_questions(report, name) if has_questions else []))
    return Table(
        tuple(columns),
        tuple(tuple(row) for row in rows),
        right=frozenset(range(1, len(columns))),
        tight=frozenset(range(len(columns))),
    )


def _questions(report: "RetentionReport", name: str) -> list[Cell]:
    scores = report.accuracy
    assert scores is not None
    if name not in scores.matrix.domains:
        return [cell("-", "")] * 3
    j, last = scores.matrix.domains.index(name), len(report.steps) - 1
    before, after = scores.value(0, j), scores.value(last, j)
    return [
        cell(percent(before), exact(before)),
        cell(percent(after), exact(after)),
        _interval(scores.intervals[last][j], "share"),
    ]


def figures_table(figures: Sequence["Figure"]) -> Table:
    """Every figure of the whole, with its interval, formula and source."""
    rows = []
    for figure in figures:
        origin = "" if figure.source == "this project" else f" ({figure.source})"
        rows.append(
            [
                cell(figure.title, figure.name),
                _shown(figure.whole, figure.unit),
                _interval(figure.whole.interval, figure.unit),
                cell(faint(figure.formula + origin), figure.formula + origin),
            ]
        )
    return table(
        ("FIGURE", "VALUE", "95 %", "FORMULA"), rows, right=("VALUE", "95 %"), tight=("FIGURE", "VALUE", "95 %")
    )


def confusion_table(report: "RetentionReport") -> Table:
    """Texts by true domain and the slot that took most of them; only what is not zero."""
    rows = []
    for name in report.columns:
        taken = sorted(report.confusion[name].items(), key=lambda item: -item[1])
        parts = [Span(f"{slot} {count}", "good" if slot == name else "warn") for slot, count in taken]
        spaced = [part for span in parts for part in (span, Span("   "))]
        rows.append([cell(name), cell(line(*spaced), " ".join(f"{slot}:{count}" for slot, count in taken))])
    return table(("TRUE DOMAIN", "TEXTS BY SLOT"), rows, tight=("TRUE DOMAIN",))


def verdict_lines(verdicts: Sequence["Verdict"]) -> list[Block]:
    """Which gates hold."""
    rows = []
    for verdict in verdicts:
        failed = ", ".join(f"{name} {show_value(value, 'nats')}" for name, value in verdict.failed.items())
        word = Span("holds", "good") if verdict.holds else Span("fails", "bad")
        rows.append([cell(str(verdict.threshold)), cell(word), cell(str(verdict.checked)), cell(failed or "-", failed)])
    return [title("Gates"), table(("GATE", "VERDICT", "CHECKED", "FAILED"), rows, right=("CHECKED",))] if rows else []


def show_value(value: float | None, unit: str) -> str:
    """A figure in its unit; small shares with two digits more."""
    if value is None:
        return "-"
    if unit == "share":
        return percent(value, digits=2 if 0 < abs(value) < 0.02 else 0)
    return f"{value:g}" if unit == "count" else bits(value)


def show_interval(interval: "Interval | None", unit: str) -> str:
    """An interval in the unit of its figure."""
    if interval is None:
        return "-"
    low, high = (show_value(bound, unit).removesuffix(" %") for bound in interval)
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"


def _number(value: float | None) -> Cell:
    return cell(bits(value), exact(value))


def _shown(value: "Value | None", unit: str) -> Cell:
    number = None if value is None else value.value
    return cell(show_value(number, unit), exact(number))


def _interval(interval: "Interval | None", unit: str) -> Cell:
    return cell(show_interval(interval, unit), " ".join(map(exact, interval or ())))
