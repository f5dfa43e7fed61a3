"""What a retention matrix says: each metric with its formula and its source. Plain numbers in, plain numbers out.

    R[i, j] = score on domain j after step i                 step 0 is the bare base model, T the last step
    L(j)    = the step at which domain j was learned
    G[i, j] = gain over the base: R[0, j] - R[i, j] where lower is better (bits per byte),
                                  R[i, j] - R[0, j] where higher is better (accuracy)

Metrics are written in gains, so that one formula holds for both kinds of scores: more is better, but for forgetting.
Each has a value for every domain (nan where it is not defined) and, as a whole, the mean over domains that have one.

R may have leading axes, the draws of a bootstrap: then every result has them too.
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
        """Takes scores as they are.

        Args:
            steps: What was learned, in order: "base", "medicine", "legal", ...
            domains: The names of the columns.
            R: (..., steps, domains); nan marks what was not measured.
            lower_is_better: True for bits per byte, False for accuracies.
            oracle: (..., domains): each domain's score under its own experts alone.
            learned: L(j); by default the step that is named like the domain.
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
        """T."""
        return len(self.steps) - 1

    @property
    def gains(self) -> Values:
        """G, of the shape of R."""
        return self._better(self.R, self.R[..., :1, :])

    @property
    def own_gain(self) -> Values:
        """G[L(j), j]: each domain's gain when it had just been learned, (..., domains)."""
        return self.gains[..., self.learned, range(len(self.domains))]

    @property
    def oracle_gain(self) -> Values:
        """Each domain's gain under its own experts alone, (..., domains)."""
        oracle = np.full(self.R[..., 0, :].shape, np.nan) if self.oracle is None else self.oracle
        return self._better(oracle, self.R[..., 0, :])

    def of(self, domains: Sequence[str]) -> "RetentionMatrix":
        """The columns of some domains; every step stays."""
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
    """R[T, j]; its mean is the average score.

    ACC of Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840).
    """
    return matrix.R[..., matrix.last, :]


def backward_transfer(matrix: RetentionMatrix) -> Values:
    """What later steps did to a domain: G[T, j] - G[L(j), j], for domains with L(j) < T. Negative means forgetting.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840): (1 / (T - 1)) sum over j < T of R[T, j] - R[j, j], for accuracies.
    """
    return _for(matrix, [step < matrix.last for step in matrix.learned], matrix.gains[..., -1, :] - matrix.own_gain)


def forgetting(matrix: RetentionMatrix) -> Values:
    """How far a domain fell from its best: max over 1 <= i < T of G[i, j], minus G[T, j], for domains with L(j) < T.

    Chaudhry et al. 2018 (arXiv 1801.10112), for accuracies. Less is better; negative where the last step is the best.
    """
    before = np.where(np.isnan(matrix.gains), -np.inf, matrix.gains)[..., 1:-1, :]
    best = before.max(axis=-2, initial=-np.inf)
    return _for(matrix, [step < matrix.last for step in matrix.learned], best - matrix.gains[..., -1, :])


def forward_transfer(matrix: RetentionMatrix) -> Values:
    """What a domain gained before it was learned: G[L(j) - 1, j], for domains with L(j) > 1.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840): (1 / (T - 1)) sum over j > 1 of R[j - 1, j] - b_j, where b_j is the
    untrained model's accuracy; here it is the base model's.
    """
    before = [max(step - 1, 0) for step in matrix.learned]
    gains = matrix.gains[..., before, range(len(matrix.domains))]
    return _for(matrix, [step > 1 for step in matrix.learned], gains)


def retention(matrix: RetentionMatrix) -> Values:
    """The share of a domain's gain that is still there: G[T, j] / G[L(j), j]; 1 means that nothing was lost.

    Not defined for a domain that gained nothing when it was learned.
    """
    return _share(matrix.gains[..., -1, :], matrix.own_gain)


def oracle_share(matrix: RetentionMatrix) -> Values:
    """(base - routed) / (base - own experts alone): G[T, j] over the gain under the right experts alone.

    1 means that routing loses nothing against an oracle that knows each text's domain. Soft gates may exceed it. Not
    defined without an oracle, or where its gain is not positive.
    """
    return _share(matrix.gains[..., -1, :], matrix.oracle_gain)


def mean(values: ArrayLike) -> Values:
    """The mean over domains (the last axis) that have a value; nan if none has."""
    array = np.asarray(values, dtype=np.float64)
    is_there = ~np.isnan(array)
    with np.errstate(invalid="ignore"):
        return np.where(is_there, array, 0.0).sum(-1) / is_there.sum(-1)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric and how to say what it is."""

    name: str
    title: str
    formula: str
    source: str
    meaning: str
    is_share: bool  # of 1; else in the units of the scores
    compute: Callable[[RetentionMatrix], Values]  # one value for each domain


_GEM: Final = "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"

METRICS: Final = {
    metric.name: metric
    for metric in (
        Metric(
            name="average_score",
            title="average score",
            formula="mean over j of R[T, j]",
            source=_GEM,
            meaning="the mean score of all domains after the last step",
            is_share=False,
            compute=final_score,
        ),
        Metric(
            name="backward_transfer",
            title="backward transfer",
            formula="mean over L(j) < T of G[T, j] - G[L(j), j]",
            source=_GEM,
            meaning="what later steps did to older domains; negative means forgetting",
            is_share=False,
            compute=backward_transfer,
        ),
        Metric(
            name="forgetting",
            title="forgetting",
            formula="mean over L(j) < T of max over 1 <= i < T of G[i, j], minus G[T, j]",
            source="Chaudhry et al. 2018, arXiv 1801.10112",
            meaning="how far older domains fell from their best; less is better",
            is_share=False,
            compute=forgetting,
        ),
        Metric(
            name="forward_transfer",
            title="forward transfer",
            formula="mean over L(j) > 1 of G[L(j) - 1, j]",
            source=_GEM,
            meaning="what domains gained before they were learned",
            is_share=False,
            compute=forward_transfer,
        ),
        Metric(
            name="retention",
            title="retention",
            formula="G[T, j] / G[L(j), j]",
            source="this project",
            meaning="the share of a domain's gain, when it was learned, that is still there",
            is_share=True,
            compute=retention,
        ),
        Metric(
            name="oracle_share",
            title="share of oracle gain",
            formula="(base - routed) / (base - own experts alone)",
            source="this project",
            meaning="what routing keeps of the gain under the right experts alone",
            is_share=True,
            compute=oracle_share,
        ),
    )
}


def _for(matrix: RetentionMatrix, applies: Sequence[bool], values: Values) -> Values:
    """The values of the domains to which a metric applies."""
    return np.where(np.asarray(applies, dtype=bool), values, np.nan)


def _share(part: Values, whole: Values) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
