"""The retention report in a terminal: heat maps, results by domain, and figures with their formulas."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...adapters.composition import GENERAL
from ...registry.measure.measurable import NOT_MEASURABLE, SMALL_SAMPLE
from ..show import facts
from ..show.charts import HEAT_LEVELS
from ..show.numbers import bits, exact, percent
from ..show.page import Block, Cell, Span, Table, cell, faint, line, table, title
from .formatting import (
    VERDICT_STYLES,
    failing_kinds,
    format_failed,
    format_interval,
    format_step,
    format_value,
    heat_levels,
)

if TYPE_CHECKING:
    from ...registry.measure.report import Figure, Interval, RetentionReport, ScoreTable, Value
    from ...registry.measure.thresholds import Verdict

MAX_COLUMNS = 10  # a heat map with more columns shows levels instead of scores; pipes get the scores


def heat_table(scores: "ScoreTable") -> Table:
    """Make the retention matrix: a row for each step, a column for each domain, coloured by score."""
    matrix, is_wide = scores.matrix, len(scores.matrix.domains) > MAX_COLUMNS
    names = [f"{j}" if is_wide else name for j, name in enumerate(matrix.domains)]
    levels = [heat_levels(scores, j, levels=HEAT_LEVELS) for j in range(len(names))]
    rows = []
    for i, step in enumerate(matrix.steps):
        cells = [_heat_cell(scores, i, j, levels[j][i], is_wide=is_wide) for j in range(len(names))]
        rows.append([cell(format_step(i, step), step), *cells])
    headings = ("STEP", *names)
    return table(headings, rows, right=names, no_wrap=headings)


def _heat_cell(scores: "ScoreTable", step: int, column: int, level: int | None, *, is_wide: bool) -> Cell:
    value = scores.value(step, column)
    if value is None:
        return cell(faint(" · "), "")
    text = str(level) if is_wide else bits(value) if scores.matrix.lower_is_better else percent(value)
    return cell(Span(f" {text} ", f"heat{level}"), exact(value))


def domains_table(report: "RetentionReport") -> Table:
    """Make the table of domains: scores of the base, when learned, and now; shares of the gain."""
    figures = {figure.name: figure for figure in report.figures}
    verdicts = {change.domain: change for change in report.changes if change.metric == "bits per byte"}
    columns = ("DOMAIN", "BASE", "LEARNED", "NOW", "95 %", "KEPT", "ORACLE GAIN", "95 %")
    rows = []
    for j, name in enumerate(report.columns):
        now, interval = report.bits.value(-1, j), report.bits.intervals[-1][j]
        share = figures["oracle_share"].domains.get(name)
        row = [
            cell("general text" if j == 0 else name, name),
            *(facts.number(report.bits.value(i, j)) for i in (0, j + 1)),
            cell(Span(bits(now), VERDICT_STYLES[verdicts[name].verdict]), exact(now)),
            _interval(interval, "bits/byte"),
            _shown(figures["retention"].domains.get(name), "share"),
            _shown(share, "share"),
            _interval(share and share.interval, "share"),
        ]
        rows.append(tuple(row))
    numbers = frozenset(range(1, len(columns)))
    # on a narrow terminal, what has two words breaks before a number is cut off
    wrapped = {columns.index("KEPT"), columns.index("ORACLE GAIN")}
    return Table(columns, tuple(rows), right=numbers, no_wrap=numbers - wrapped)


def verdicts_table(report: "RetentionReport") -> Table:
    """Make the table of what became of each domain, the worst first: a word, and its colour."""
    columns = ("DOMAIN", "VERDICT", "BEFORE", "NOW", "95 % OF CHANGE", "N")
    rows = []
    for change in report.changes:
        unit = "bits/byte" if change.metric == "bits per byte" else "share"
        rows.append(
            [
                cell("general text" if change.domain == GENERAL else change.domain, change.domain),
                cell(Span(change.words, VERDICT_STYLES[change.verdict])),
                cell(format_value(change.before, unit), exact(change.before)),
                cell(format_value(change.now, unit), exact(change.now)),
                _interval(change.interval, "share"),
                cell(
                    Span(f"{change.samples}, few", "warn") if change.samples < SMALL_SAMPLE else str(change.samples),
                    change.samples,
                ),
            ]
        )
    return table(columns, rows, right=columns[2:], no_wrap=(columns[0], *columns[2:]))


def kind_blocks(report: "RetentionReport", verdicts: Sequence["Verdict"]) -> list[Block]:
    """Make the table of kinds of text that got worse or miss a threshold, and what each is recognized by."""
    shown = failing_kinds(report, verdicts)
    if not shown:
        return []
    columns = ("KIND", "VERDICT", "LEARNED", "NOW", "95 % OF CHANGE", "N")
    rows = [
        [
            cell(change.domain),
            cell(Span(change.words, VERDICT_STYLES[change.verdict])),
            cell(bits(change.before), exact(change.before)),
            cell(bits(change.now), exact(change.now)),
            _interval(change.interval, "share"),
            cell(str(change.samples)),
        ]
        for change in shown
    ]
    listed = table(columns, rows, right=columns[2:], no_wrap=columns[2:])
    found = [report.portrait(change.domain) for change in shown]
    return [title("Kinds of text", faint("   that an average hides")), listed, *facts.portraits(found)]


def questions_table(report: "RetentionReport", scores: "ScoreTable") -> Table:
    """Make the table of accuracies: of the base, and after the last step."""
    last, rows = len(scores.matrix.steps) - 1, []
    verdicts = {change.domain: change.verdict for change in report.changes if change.metric == "accuracy"}
    for j, name in enumerate(scores.matrix.domains):
        before, after = scores.value(0, j), scores.value(last, j)
        interval = _interval(scores.intervals[last][j], "share")
        now = Span(percent(after), VERDICT_STYLES[verdicts[name]])
        rows.append([cell(name), cell(percent(before), exact(before)), cell(now, exact(after)), interval])
    columns = ("QUESTIONS", "BASE", "NOW", "95 %")
    return table(columns, rows, right=columns[1:], no_wrap=columns)


def figures_table(figures: Sequence["Figure"]) -> Table:
    """Make the table of all figures with interval, formula and source."""
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
        ("FIGURE", "VALUE", "95 %", "FORMULA"), rows, right=("VALUE", "95 %"), no_wrap=("FIGURE", "VALUE", "95 %")
    )


def confusion_table(report: "RetentionReport") -> Table:
    """Make the table of texts by true domain and by the slot with their largest gate; zero counts are left out."""
    rows, right = [], report.figure("routing_accuracy").domains
    for name in report.columns:
        taken = sorted(report.confusion[name].items(), key=lambda item: -item[1])
        parts = [Span(f"{slot} {count}", "good" if slot == name else "warn") for slot, count in taken]
        spaced = [part for span in parts for part in (span, Span("   "))]
        texts = cell(line(*spaced), " ".join(f"{slot}:{count}" for slot, count in taken))
        rows.append([cell(name), _shown(right[name], "share"), texts])
    return table(("TRUE DOMAIN", "RIGHT", "TEXTS BY SLOT"), rows, right=("RIGHT",), no_wrap=("TRUE DOMAIN", "RIGHT"))


def verdict_lines(verdicts: Sequence["Verdict"]) -> list[Block]:
    """Make the table of thresholds."""
    rows = []
    for verdict in verdicts:
        failed = format_failed(verdict)
        word = Span("holds", "good") if verdict.holds else Span("fails", "bad")
        rows.append([cell(str(verdict.threshold)), cell(word), cell(str(verdict.checked)), cell(failed or "-", failed)])
    return (
        [title("Thresholds"), table(("GATE", "VERDICT", "CHECKED", "FAILED"), rows, right=("CHECKED",))] if rows else []
    )


def _shown(value: "Value | None", unit: str) -> Cell:
    number = None if value is None else value.value
    if value is not None and value.reason is not None:
        return cell(Span(NOT_MEASURABLE, "warn"), NOT_MEASURABLE)
    return cell(format_value(number, unit), exact(number))


def _interval(interval: "Interval | None", unit: str) -> Cell:
    return cell(format_interval(interval, unit), " ".join(map(exact, interval or ())))
