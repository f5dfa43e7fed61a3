"""95 % confidence intervals: Wilson's for shares, the bootstrap over texts for everything else. No torch.

Texts are drawn with replacement. All figures of one domain are computed from the same draws (paired), so that the
interval of a difference or of a share is that of the difference, not of two figures on their own.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 1000
_Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    share, spread = correct / total, _Z95**2 / total
    middle = share + spread / 2
    half = _Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def ratio_draws(
    numerators: ArrayLike, denominators: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Ratios of sums over texts that were drawn with replacement (Efron 1979): sum of numerators / sum of denominators.

    Args:
        numerators: (rows, texts): nats of each text under several models, say. All rows share the draws.
        denominators: (texts,): bytes of each text, or ones for a mean.
        draws: How often.
        seed: Same seed, same draws.

    Returns:
        (draws, rows), float64.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    texts = len(below)
    # how often each text is drawn: equal to drawing indices, and the sums become one product
    counts = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=draws).astype(np.float64)
    totals = counts @ below
    return (counts @ above.T) / np.where(totals > 0, totals, 1.0)[:, None]


def percentile_interval(draws: ArrayLike) -> tuple[float, float] | None:
    """The middle 95 % of a figure's draws (the percentile bootstrap); None where the figure is not defined."""
    values = np.asarray(draws, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
