"""Format the figures of a retention report: values, intervals, steps, and the colour levels of a heat map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...registry.measure.measurable import NOT_MEASURABLE, SMALL_SAMPLE
from ..show.charts import heat
from ..show.numbers import bits, percent

if TYPE_CHECKING:
    from ...registry.measure.changes import Change
    from ...registry.measure.report import Interval, RetentionReport, ScoreTable, Value
    from ...registry.measure.thresholds import Verdict

VERDICT_STYLES: Final = {"worse": "bad", "unclear": "warn", "kept": "good"}


def heat_levels(scores: "ScoreTable", column: int, *, levels: int) -> list[int | None]:
    """Return the colour level of each step of a column: 0 for its best score, None where nothing was measured.

    A column's colours span at least 5 % of its highest bits per byte, or 20 points of accuracy, so that noise has one
    colour.
    """
    is_lower = scores.matrix.lower_is_better
    values = [scores.value(i, column) for i in range(len(scores.matrix.steps))]
    losses = [None if value is None else value if is_lower else -value for value in values]
    known = [loss for loss in losses if loss is not None]
    min_span = max(known) / 20 if is_lower else 0.2
    return [None if loss is None else heat(loss, known, levels=levels, min_span=min_span) for loss in losses]


def worse_columns(report: "RetentionReport", scores: "ScoreTable") -> set[int]:
    """Return the columns of a retention matrix whose last score is worse beyond its interval."""
    metric = "bits per byte" if scores.matrix.lower_is_better else "accuracy"
    names = {change.domain for change in report.worse if change.metric == metric}
    return {j for j, name in enumerate(scores.matrix.domains) if name in names}


def failing_kinds(report: "RetentionReport", verdicts: "Sequence[Verdict]") -> "list[Change]":
    """Return the kinds of text that got worse or miss a threshold."""
    failed = {name for verdict in verdicts for name in verdict.failed}
    return [change for change in report.kind_changes if change.is_worse or change.domain in failed]


def score_unit(scores: "ScoreTable") -> str:
    """Return the unit of a retention matrix: bits/byte, or share for accuracies."""
    return "bits/byte" if scores.matrix.lower_is_better else "share"


def format_step(index: int, step: str) -> str:
    """Format the name of a step; each step after the bare base model adds something."""
    return step if index == 0 else f"+ {step}"


def format_value(value: float | None, unit: str) -> str:
    """Format a figure in its unit; a share below 2 % gets two more digits."""
    if value is None:
        return "-"
    if unit == "share":
        return percent(value, digits=_digits(value))
    return f"{value:g}" if unit == "count" else bits(value)


def format_figure(value: "Value | None", unit: str) -> str:
    """Format the value of a figure; one that should have a value and has none says so."""
    if value is not None and value.reason is not None:
        return NOT_MEASURABLE
    return format_value(None if value is None else value.value, unit)


def not_measurable(report: "RetentionReport") -> dict[tuple[str, str], str]:
    """Return why shares are not measurable, by title of the figure and domain."""
    return {(f.title, name): why for f in report.figures for name, why in f.not_measurable.items()}


def format_count(count: int) -> str:
    """Format the number of texts or questions, marked where it is small.

    >>> format_count(7), format_count(120)
    ('n = 7, few', 'n = 120')
    """
    return f"n = {count}, few" if count < SMALL_SAMPLE else f"n = {count}"


def format_interval(interval: "Interval | None", unit: str) -> str:
    """Format an interval in the unit of its figure, both bounds with the same number of digits.

    >>> format_interval((-0.09, 0.0046), "share"), format_interval((-0.003, 0.0012), "share")
    ('-9 to 0', '-0.30 to 0.12')
    """
    if interval is None:
        return "-"
    if unit == "share":
        digits = min((_digits(bound) for bound in interval if bound), default=0)
        low, high = (percent(bound, digits=digits).removesuffix(" %") for bound in interval)
    else:
        low, high = (format_value(bound, unit) for bound in interval)
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"


def format_failed(verdict: "Verdict") -> str:
    """Format the domains that miss a threshold, with their values."""
    return ", ".join(
        f"{name} {NOT_MEASURABLE if name in verdict.reasons else format_value(value, 'nats')}"
        for name, value in verdict.failed.items()
    )


def _digits(share: float) -> int:
    return 2 if abs(share) < 0.02 and share else 0
