"""Thresholds that a report must hold: `retention>=0.98`, checked for every domain that has the figure.

    gate      NAME OPERATOR NUMBER
    NAME      a figure of the report
    OPERATOR  >=  <=  >  <

A figure of domains holds if it holds for each of them, one without domains if it holds as a whole. Domains to which a
figure does not apply (the last one cannot have been forgotten yet) are passed over; a share that is not defined because
the domain gained nothing does not hold.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...domains.errors import GateFailedError, InputError
from .report import Figure, RetentionReport, figure_names

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE: Final = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A gate as it was asked for."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return _COMPARE[self.operator](value, self.bound)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one gate."""

    threshold: Threshold
    failed: dict[str, float | None]  # by domain, or by the figure's own name where it has no domains
    checked: int

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        failed = {name: None if value is None else round(value, 6) for name, value in self.failed.items()}
        return {"gate": str(self.threshold), "holds": self.holds, "checked": self.checked, "failed": failed}


def parse_threshold(text: str) -> Threshold:
    """Reads one gate.

    >>> str(parse_threshold("retention >= 0.980"))
    'retention>=0.98'

    Raises:
        InputError: It breaks the grammar, or there is no such figure.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text!r} is not a gate.",
            cause="expected NAME, one of >= <= > <, and a number",
            fix='registry report --gate "retention>=0.98"',
        )
    if match[1] not in figure_names():
        raise InputError(
            f"There is no figure {match[1]!r}.",
            cause=f"there are {', '.join(sorted(figure_names()))}",
            fix='registry report --gate "retention>=0.98"',
        )
    return Threshold(name=match[1], operator=match[2], bound=float(match[3]))


def judge(report: RetentionReport, thresholds: Sequence[Threshold]) -> list[Verdict]:
    """The verdicts, in order.

    Raises:
        InputError: A figure is not in this report: it is about questions, and no domain has any.
    """
    figures = {figure.name: figure for figure in report.figures}
    verdicts = []
    for threshold in thresholds:
        if threshold.name not in figures:
            raise InputError(
                f"This report has no figure {threshold.name!r}.",
                cause="it is about questions with choices: no domain has any, or --no-questions was given",
                fix="leave the gate out",
            )
        verdicts.append(_judge(figures[threshold.name], threshold))
    return verdicts


def check_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Passes if every gate holds.

    Raises:
        GateFailedError: One does not; names the domains that failed, with their values.
    """
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed:
        raise GateFailedError(
            f"{len(failed)} of {len(verdicts)} gates failed: {', '.join(str(v.threshold) for v in failed)}.",
            cause="; ".join(f"{v.threshold.name} of {_listed(v.failed)}" for v in failed),
            fix="retrain what failed: registry retrain NAME --data FILE; or see every number: registry report --json",
        )


def _judge(figure: Figure, threshold: Threshold) -> Verdict:
    values = {name: value.value for name, value in figure.applying.items()} or {figure.name: figure.whole.value}
    failed = {name: value for name, value in values.items() if value is None or not threshold.holds(value)}
    return Verdict(threshold=threshold, failed=failed, checked=len(values))


def _listed(failed: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} is {'not defined' if value is None else f'{value:.4g}'}" for name, value in failed.items()
    )
