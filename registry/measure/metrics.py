"""Compute the metrics of a retention matrix, each with its formula and its source; needs numpy only.

    R[i, j] = score on domain j after step i                 step 0 is the bare base model, T the last step
    L(j)    = the step at which domain j was learned
    G[i, j] = gain over the base: R[0, j] - R[i, j] where lower is better (bits per byte),
                                  R[i, j] - R[0, j] where higher is better (accuracy)

Metrics are defined in gains, so one formula serves both kinds of scores: higher is better, except for forgetting. A
metric has a value for every domain (nan where it is undefined); the overall value is the mean over the others.

R may have leading axes, such as the draws of a bootstrap; results have the same leading axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


class RetentionMatrix:
    """Scores by step and domain."""

    def __init__(
        self,
        *,
        steps: Sequence[str],
        domains: Sequence[str],
        R: ArrayLike,
        lower_is_better: bool,
        oracle: ArrayLike | None = None,
        learned: Sequence[int] | None = None,
    ):
        """Store the scores.

        Args:
            steps: What was added at each step: "base", "medicine", "legal", ...
            domains: Names of the columns.
            R: (..., steps, domains); nan where nothing was measured.
            lower_is_better: True for bits per byte, False for accuracies.
            oracle: (..., domains): each domain's score under its own experts alone.
            learned: L(j); by default the step with the name of the domain.
        """
        self.steps, self.domains = tuple(steps), tuple(domains)
        self.R: Values = np.asarray(R, dtype=np.float64)
        self.lower_is_better = lower_is_better
        self.oracle: Values | None = None if oracle is None else np.asarray(oracle, dtype=np.float64)
        self.learned = tuple(learned) if learned is not None else tuple(map(self.steps.index, self.domains))
        if self.R.shape[-2:] != (len(self.steps), len(self.domains)) or len(self.learned) != len(self.domains):
            raise ValueError(f"R is {self.R.shape} for {len(self.steps)} steps and {len(self.domains)} domains")

    @property
    def last(self) -> int:
        """Index of the last step, T."""
        return len(self.steps) - 1

    @property
    def gains(self) -> Values:
        """G, in the shape of R."""
        return self._better(self.R, self.R[..., :1, :])

    @property
    def own_gain(self) -> Values:
        """G[L(j), j]: gain of each domain right after it was learned, (..., domains)."""
        return self.gains[..., self.learned, range(len(self.domains))]

    @property
    def oracle_gain(self) -> Values:
        """Gain of each domain under its own experts alone, (..., domains)."""
        oracle = np.full(self.R[..., 0, :].shape, np.nan) if self.oracle is None else self.oracle
        return self._better(oracle, self.R[..., 0, :])

    def of(self, domains: Sequence[str]) -> "RetentionMatrix":
        """Return the matrix of some domains, with all steps."""
        columns = [self.domains.index(name) for name in domains]
        return RetentionMatrix(
            steps=self.steps,
            domains=domains,
            R=self.R[..., columns],
            lower_is_better=self.lower_is_better,
            oracle=None if self.oracle is None else self.oracle[..., columns],
            learned=[self.learned[j] for j in columns],
        )

    def _better(self, scores: Values, base: Values) -> Values:
        return base - scores if self.lower_is_better else scores - base


def final_score(matrix: RetentionMatrix) -> Values:
    """Return R[T, j]; its mean is the average score.

    ACC of Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840).
    """
    return matrix.R[..., matrix.last, :]


def backward_transfer(matrix: RetentionMatrix) -> Values:
    """Return G[T, j] - G[L(j), j] for domains with L(j) < T: the effect of later steps; negative means forgetting.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840): (1 / (T - 1)) sum over j < T of R[T, j] - R[j, j], for accuracies.
    """
    return _where(matrix, [step < matrix.last for step in matrix.learned], matrix.gains[..., -1, :] - matrix.own_gain)


def forgetting(matrix: RetentionMatrix) -> Values:
    """Return max over 1 <= i < T of G[i, j], minus G[T, j], for domains with L(j) < T: the drop from the best gain.

    Chaudhry et al. 2018 (arXiv 1801.10112), for accuracies. Lower is better; negative where the last step is the best.
    """
    before = np.where(np.isnan(matrix.gains), -np.inf, matrix.gains)[..., 1:-1, :]
    best = before.max(axis=-2, initial=-np.inf)
    return _where(matrix, [step < matrix.last for step in matrix.learned], best - matrix.gains[..., -1, :])


def forward_transfer(matrix: RetentionMatrix) -> Values:
    """Return G[L(j) - 1, j] for domains with L(j) > 1: the gain before the domain was learned.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840): (1 / (T - 1)) sum over j > 1 of R[j - 1, j] - b_j, where b_j is the
    untrained model's accuracy; here it is the base model's.
    """
    before = [max(step - 1, 0) for step in matrix.learned]
    gains = matrix.gains[..., before, range(len(matrix.domains))]
    return _where(matrix, [step > 1 for step in matrix.learned], gains)


def retention(matrix: RetentionMatrix) -> Values:
    """Return G[T, j] / G[L(j), j]: the share of a domain's gain that is retained; 1 means that nothing was lost.

    Undefined for a domain without a gain when it was learned.
    """
    return _share(matrix.gains[..., -1, :], matrix.own_gain)


def oracle_share(matrix: RetentionMatrix) -> Values:
    """Return G[T, j] divided by the gain under the domain's own experts alone.

    1 means that routing loses nothing against an oracle that is given each text's domain; soft gates may exceed it.
    Undefined without an oracle, or where its gain is not positive.
    """
    return _share(matrix.gains[..., -1, :], matrix.oracle_gain)


def mean(values: ArrayLike) -> Values:
    """Return the mean over domains (the last axis) with a value; nan if there are none."""
    array = np.asarray(values, dtype=np.float64)
    is_defined = ~np.isnan(array)
    with np.errstate(invalid="ignore"):
        return np.where(is_defined, array, 0.0).sum(-1) / is_defined.sum(-1)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric with its description."""

    name: str
    title: str
    formula: str
    source: str
    meaning: str
    compute: Callable[[RetentionMatrix], Values]  # one value for each domain
    divisor: Callable[[RetentionMatrix], Values] | None = None  # of a share; others are in the unit of the scores

    @property
    def is_share(self) -> bool:
        """Whether it is a ratio of gains."""
        return self.divisor is not None


_GEM: Final = "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"

METRICS: Final = {
    metric.name: metric
    for metric in (
        Metric(
            name="average_score",
            title="average score",
            formula="mean over j of R[T, j]",
            source=_GEM,
            meaning="mean score of all domains after the last step",
            compute=final_score,
        ),
        Metric(
            name="backward_transfer",
            title="backward transfer",
            formula="mean over L(j) < T of G[T, j] - G[L(j), j]",
            source=_GEM,
            meaning="effect of later steps on older domains; negative means forgetting",
            compute=backward_transfer,
        ),
        Metric(
            name="forgetting",
            title="forgetting",
            formula="mean over L(j) < T of max over 1 <= i < T of G[i, j], minus G[T, j]",
            source="Chaudhry et al. 2018, arXiv 1801.10112",
            meaning="drop of older domains from their best gain; lower is better",
            compute=forgetting,
        ),
        Metric(
            name="forward_transfer",
            title="forward transfer",
            formula="mean over L(j) > 1 of G[L(j) - 1, j]",
            source=_GEM,
            meaning="gain of domains before they were learned",
            compute=forward_transfer,
        ),
        Metric(
            name="retention",
            title="retention",
            formula="G[T, j] / G[L(j), j]",
            source="this project",
            meaning="share of a domain's gain, right after it was learned, that is retained",
            compute=retention,
            divisor=lambda matrix: matrix.own_gain,
        ),
        Metric(
            name="oracle_share",
            title="share of oracle gain",
            formula="(base - routed) / (base - own experts alone)",
            source="this project",
            meaning="share of the gain under the domain's own experts alone that routing achieves",
            compute=oracle_share,
            divisor=lambda matrix: matrix.oracle_gain,
        ),
    )
}


def _where(matrix: RetentionMatrix, applies: Sequence[bool], values: Values) -> Values:
    """Return `values`, with nan for domains that a metric does not apply to."""
    return np.where(np.asarray(applies, dtype=bool), values, np.nan)


def _share(part: Values, whole: Values) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
