"""Find what got worse: each domain's score now against when it was learned and against the bare base.

The bootstrap is paired, so a change has its own interval. A change is worse if it is more than `TOLERATED` and its
interval excludes zero; with fewer than `MIN_TEXTS` texts there is no interval, and any such change counts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np

from ...adapters.composition import GENERAL
from ...domains.statistics.intervals import percentile_interval
from .measurable import MIN_TEXTS, SMALL_SAMPLE
from .metrics import RetentionMatrix, Values

TOLERATED: Final = 0.005  # relative rise of bits per byte; two seeds of one training differ by less (docs/log.md)
SINCE_LEARNED: Final = "when it was learned"
SINCE_BASE: Final = "the bare base"

Interval = tuple[float, float]
Verdict = Literal["worse", "unclear", "kept"]
_ORDER: Final = ("kept", "unclear", "worse")
_WORDS: Final = {"worse": "worse", "unclear": "perhaps worse"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one domain's score changed; a positive change is worse."""

    domain: str
    metric: Literal["bits per byte", "accuracy"]
    against: str
    before: float
    now: float
    change: float  # relative for bits per byte, points of accuracy
    interval: Interval | None  # None for so few texts that there is none
    samples: int
    step: str | None  # what was added where it got worse most; None if it did not
    verdict: Verdict

    @property
    def is_worse(self) -> bool:
        """Whether it got worse beyond its interval."""
        return self.verdict == "worse"

    @property
    def words(self) -> str:
        """A few words, the verdict first, so that no reader needs a colour: by how much, since what was added, n."""
        of_bits = self.metric == "bits per byte"
        if self.verdict == "kept":
            return "kept" if of_bits else "accuracy kept"
        amount = f"{self.change * 100:+.3g} % bits" if of_bits else f"{-self.change * 100:+.3g} points of accuracy"
        few = f", n = {self.samples}" if self.samples < SMALL_SAMPLE else ""
        against = f" against {self.against}" if self.against == SINCE_BASE else ""
        return f"{_WORDS[self.verdict]}: {amount}{against}, most with + {self.step}{few}"

    def as_json(self) -> dict[str, Any]:
        """Return the rounded content for JSON."""
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return rounded | {"interval": self.interval and [round(bound, 6) for bound in self.interval]}


def find_changes(matrix: RetentionMatrix, draws: RetentionMatrix, counts: Mapping[str, int]) -> tuple[Change, ...]:
    """Return one change for each domain: against the base or when it was learned, whichever is the worse."""
    return tuple(
        max(_changes_of(matrix, draws, j, counts[name]), key=lambda one: (_ORDER.index(one.verdict), one.change))
        for j, name in enumerate(matrix.domains)
    )


def _changes_of(matrix: RetentionMatrix, draws: RetentionMatrix, column: int, samples: int) -> list[Change]:
    learned = matrix.learned[column]
    found = [_change(matrix, draws, column, 0, SINCE_BASE, samples)]
    if learned < matrix.last and matrix.domains[column] != GENERAL:
        found.append(_change(matrix, draws, column, learned, SINCE_LEARNED, samples))
    return found


def _change(
    matrix: RetentionMatrix, draws: RetentionMatrix, column: int, first: int, against: str, samples: int
) -> Change:
    R, drawn = matrix.R[:, column], draws.R[:, :, column]
    change = float(_worsening(R[first], R[-1], lower_is_better=matrix.lower_is_better))
    interval = None
    if samples >= MIN_TEXTS:
        interval = percentile_interval(
            _worsening(drawn[:, first], drawn[:, -1], lower_is_better=matrix.lower_is_better)
        )
    is_more = change > (TOLERATED if matrix.lower_is_better else 0)
    is_certain = interval is None or interval[0] > 0
    return Change(
        domain=matrix.domains[column],
        metric="bits per byte" if matrix.lower_is_better else "accuracy",
        against=against,
        before=float(R[first]),
        now=float(R[-1]),
        change=change,
        interval=interval,
        samples=samples,
        step=_step(matrix, column, first) if is_more else None,
        verdict=("worse" if is_certain else "unclear") if is_more else "kept",
    )


def _worsening(before: Values, now: Values, *, lower_is_better: bool) -> Values:
    return (now - before) / before if lower_is_better else before - now


def _step(matrix: RetentionMatrix, column: int, first: int) -> str:
    """Return what was added at the step with the largest worsening after step `first`."""
    measured = [i for i in range(first, matrix.last + 1) if np.isfinite(matrix.R[i, column])]
    scores = matrix.R[measured, column]
    rises = np.diff(scores) if matrix.lower_is_better else -np.diff(scores)
    return matrix.steps[measured[1 + int(rises.argmax())]]
