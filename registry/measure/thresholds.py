"""Check a report against thresholds such as `retention>=0.98`.

    threshold  NAME OPERATOR NUMBER
    NAME       a figure of the report
    OPERATOR   >=  <=  >  <

A figure with values for domains must meet the threshold for every domain, any other figure as a whole. Domains that a
figure does not apply to are skipped (the newest domain cannot have been forgotten yet). A share that is undefined
because the domain gained nothing fails.
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
_THRESHOLD: Final = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Parsed threshold."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"

    def holds(self, value: float) -> bool:
        """Return whether a value meets the threshold."""
        return _COMPARE[self.operator](value, self.bound)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of one threshold."""

    threshold: Threshold
    failed: dict[str, float | None]  # values by domain, or by the name of a figure without domains
    checked: int  # number of values

    @property
    def holds(self) -> bool:
        """Whether all values meet the threshold."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Return the content for --json."""
        failed = {name: None if value is None else round(value, 6) for name, value in self.failed.items()}
        return {"gate": str(self.threshold), "holds": self.holds, "checked": self.checked, "failed": failed}


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
        verdicts.append(_judge(figures[threshold.name], threshold))
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
            cause="; ".join(f"{v.threshold.name} of {_listed(v.failed)}" for v in failed),
            fix="retrain these domains: registry retrain NAME --data FILE; all figures: registry report --json",
        )


def _judge(figure: Figure, threshold: Threshold) -> Verdict:
    values = {name: value.value for name, value in figure.applying.items()} or {figure.name: figure.whole.value}
    failed = {name: value for name, value in values.items() if value is None or not threshold.holds(value)}
    return Verdict(threshold=threshold, failed=failed, checked=len(values))


def _listed(failed: dict[str, float | None]) -> str:
    return ", ".join(f"{name} is {'undefined' if value is None else f'{value:.4g}'}" for name, value in failed.items())
