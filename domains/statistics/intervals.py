"""95 % confidence intervals: Wilson's for shares, the bootstrap over texts for other figures; imports no torch.

All figures of a domain are computed from the same draws (a paired bootstrap), so that intervals of differences and
ratios of figures are valid.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 1000
_Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of correct / total (Wilson 1927)."""
    share, spread = correct / total, _Z95**2 / total
    middle = share + spread / 2
    half = _Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def ratio_draws(
    numerators: ArrayLike, denominators: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Return ratios of sums over texts drawn with replacement (Efron 1979): sum of numerators / sum of denominators.

    Args:
        numerators: (rows, texts), such as nats of each text under several models; all rows share the draws.
        denominators: (texts,), such as bytes of each text, or ones for a mean.
        draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        (draws, rows), float64.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    texts = len(below)
    # counts of each text instead of indices: the sums become one matrix product
    counts = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=draws).astype(np.float64)
    totals = counts @ below
    return (counts @ above.T) / np.where(totals > 0, totals, 1.0)[:, None]


def percentile_interval(draws: ArrayLike) -> tuple[float, float] | None:
    """Return the middle 95 % of finite draws (percentile bootstrap), or None if there are none."""
    values = np.asarray(draws, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
