"""Check a report against thresholds such as `retention>=0.98`.

    threshold  NAME OPERATOR NUMBER
    NAME       a figure of the report
    OPERATOR   >=  <=  >  <

A figure with values for domains must meet the threshold for every domain, any other figure as a whole. Domains that a
figure does not apply to are skipped (the newest domain cannot have been forgotten yet). What is not measurable, as the
share of a gain that is not told from zero, fails.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...domains.errors import GateFailedError, InputError
from .measurable import NOT_MEASURABLE
from .report import Figure, RetentionReport, figure_names, split_label

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_THRESHOLD: Final = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*")
_DIGITS: Final = 10  # after the point


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Parsed threshold."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        bound = f"{self.bound:.{_DIGITS}f}".rstrip("0").rstrip(".")
        return f"{self.name}{self.operator}{bound}"

    def holds(self, value: float) -> bool:
        """Return whether a value meets the threshold."""
        return _COMPARE[self.operator](value, self.bound)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of one threshold."""

    threshold: Threshold
    failed: dict[str, float | None]  # values by domain, or by the name of a figure without domains
    checked: int  # number of values
    reasons: dict[str, str] = field(default_factory=dict)  # of those that are not measurable
    held: tuple[str, ...] = ()  # the domains that meet it

    @property
    def holds(self) -> bool:
        """Whether all values meet the threshold."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Return the content for --json."""
        failed = {name: None if value is None else round(value, 6) for name, value in self.failed.items()}
        found = {"gate": str(self.threshold), "holds": self.holds, "checked": self.checked, "failed": failed}
        return found | {"reasons": self.reasons} if self.reasons else found


def parse_threshold(text: str) -> Threshold:
    """Parse one threshold.

    >>> str(parse_threshold("retention >= 0.980"))
    'retention>=0.98'

    Raises:
        InputError: `text` violates the grammar, or there is no such figure.
    """
    match = _THRESHOLD.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text!r} is not a threshold.",
            cause="expected NAME, one of >= <= > <, and a number",
            fix='registry report --gate "retention>=0.98"',
        )
    if match[1] not in figure_names():
        raise InputError(
            f"There is no figure {match[1]!r}.",
            cause=f"the figures are {', '.join(sorted(figure_names()))}",
            fix='registry report --gate "retention>=0.98"',
        )
    return Threshold(name=match[1], operator=match[2], bound=float(match[3]))


def judge(report: RetentionReport, thresholds: Sequence[Threshold]) -> list[Verdict]:
    """Return the verdict on each threshold, in order.

    Raises:
        InputError: A figure is missing because it needs questions, and no domain has any.
    """
    figures = {figure.name: figure for figure in report.figures}
    verdicts = []
    for threshold in thresholds:
        if threshold.name not in figures:
            raise InputError(
                f"This report has no figure {threshold.name!r}.",
                cause="it needs questions with choices: no domain has any, or --no-questions was given",
                fix="remove the threshold, or run the report without --no-questions",
            )
        verdict = _judge(figures[threshold.name], threshold)
        kinds = report.kind_figures.get(threshold.name)
        verdicts.append(_with_kinds(verdict, kinds, report) if kinds else verdict)
    return verdicts


def check_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Raise if a threshold was not met.

    Raises:
        GateFailedError: Names the thresholds, and the domains that failed with their values.
    """
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed:
        raise GateFailedError(
            f"{len(failed)} of {len(verdicts)} thresholds were not met: {', '.join(str(v.threshold) for v in failed)}.",
            cause="; ".join(f"{v.threshold.name} of {_listed(v)}" for v in failed),
            fix=_fix(verdicts),
        )


def _judge(figure: Figure, threshold: Threshold) -> Verdict:
    found = figure.applying or {figure.name: figure.whole}
    values = {name: value.value for name, value in found.items()}
    failed = {name: value for name, value in values.items() if value is None or not threshold.holds(value)}
    return Verdict(
        threshold=threshold,
        failed=failed,
        checked=len(values),
        reasons={name: value.reason for name, value in found.items() if value.reason is not None},
        held=tuple(name for name in figure.applying if name not in failed),
    )


def _with_kinds(verdict: Verdict, figure: Figure, report: RetentionReport) -> Verdict:
    """Return the verdict with the kinds of text that miss the threshold beyond their interval.

    A kind whose share is not measurable fails if it got worse beyond its interval.
    """
    worse = {change.domain: change.words for change in report.kind_changes if change.is_worse}
    failed, reasons = dict(verdict.failed), dict(verdict.reasons)
    for name, value in figure.applying.items():
        if value.value is None:
            if name in worse:
                failed[name], reasons[name] = None, worse[name]
        elif not any(map(verdict.threshold.holds, (value.value, *(value.interval or ())))):
            failed[name] = value.value
    return replace(verdict, failed=failed, reasons=reasons, checked=verdict.checked + len(figure.applying))


def _listed(verdict: Verdict) -> str:
    return ", ".join(f"{name} is {_told(value, verdict.reasons.get(name))}" for name, value in verdict.failed.items())


def _told(value: float | None, reason: str | None) -> str:
    if reason is not None:
        return f"{NOT_MEASURABLE} ({reason})"
    return "undefined" if value is None else f"{value:.4g}"


def _fix(verdicts: Sequence[Verdict]) -> str:
    """Return commands that work as they stand: on what is kept exactly, and to judge by what can be reached."""
    failed = [verdict for verdict in verdicts if not verdict.holds]
    names = [split_label(name)[0] for verdict in failed for name in verdict.failed if name not in figure_names()]
    unmeasured = {split_label(one)[0] for verdict in failed for one, value in verdict.failed.items() if value is None}
    measured = [name for name in names if name not in unmeasured]
    fixes = []
    if measured:
        fixes.append(f"a domain that is composed alone is as it was learned: registry compose {measured[0]}")
    judged = [verdict for verdict in verdicts if None not in verdict.failed.values()]
    if judged:
        gates = " ".join(f'--gate "{_reached(verdict)}"' for verdict in judged)
        fixes.append(f"to accept what was measured: registry report {gates}")
    others = [name for name in dict.fromkeys(name for v in verdicts for name in v.held) if name not in unmeasured]
    if unmeasured and others:
        fixes.append(f"to judge the others: registry report --domains {','.join(others)}")
    for name in sorted(unmeasured.intersection(names))[:1]:
        fixes.append(f"to measure it on more text of your own: registry evaluate {name} --data FILE")
    if unmeasured - set(names):
        fixes.append(f"leave out what applies to no domain here: {', '.join(sorted(unmeasured - set(names)))}")
    return "; ".join(fixes)


def _reached(verdict: Verdict) -> Threshold:
    """Return the closest threshold of four digits that the measured values meet."""
    values = [value for value in verdict.failed.values() if value is not None]
    if not values:
        return verdict.threshold
    is_least = verdict.threshold.operator.startswith(">")
    worst = min(values) if is_least else max(values)
    digits = 10.0 ** min(_DIGITS, 4 - math.ceil(math.log10(abs(worst)))) if worst else 1.0
    bound = (math.floor if is_least else math.ceil)(worst * digits) / digits
    return replace(verdict.threshold, operator=">=" if is_least else "<=", bound=bound)
