"""How many experts each decoder layer carries: deeper layers more, the total always exact.

The first layers can be left without any (`expert_free`): that is cheaper, and the domain router then reads the hidden
state behind them, which stays a function of the frozen base model alone.

Schedules give each expert-bearing layer a weight; largest-remainder rounding turns weights into counts with the exact
total, at least one expert each:

    uniform    1, 1, 1, ...
    linear     1, 2, 3, ...
    quarters   2, 4, 6, 8 by quarter of the depth (MoLA, arXiv:2402.08562)
    data       weights measured on the domain's own text, given by the caller
"""

import math
from collections.abc import Sequence

from ..domains.errors import InputError

MAX_EXPERTS = 1024  # a layer on average, so that a slip of the pen does not fill the memory
SCHEDULES = ("linear", "quarters", "uniform", "data")


def expert_free_layers(layers: int, fraction: float) -> int:
    """How many of the first layers carry no experts: `fraction` of the depth, rounded, always leaving one that does."""
    if not 0 <= fraction < 1:
        raise InputError(f"expert_free must be in [0, 1), found {fraction}.")
    return min(layers - 1, round(layers * fraction))


def allocate(
    layers: int, *, experts: float, schedule: str, expert_free: float, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Expert counts of all decoder layers.

    Args:
        layers: Decoder layers of the base model.
        experts: Mean number of experts over the layers that carry any; the total is this times their number, rounded.
        schedule: One of `SCHEDULES`.
        expert_free: Fraction of the depth, from the input, that carries none.
        weights: For `data` only: one positive weight for each expert-bearing layer.

    Returns:
        One count a layer; their sum is `round(experts * bearing)`.

    Raises:
        InputError: Unknown schedule, too few experts to give each bearing layer one, too many, or weights that do not
            fit.
    """
    free = expert_free_layers(layers, expert_free)
    bearing = layers - free
    if not experts <= MAX_EXPERTS:  # so written, it refuses nan as well
        raise InputError(f"There can be at most {MAX_EXPERTS:,} experts a layer, found {experts:,}.")
    total = round(experts * bearing)
    if total < bearing:
        raise InputError(
            f"{experts} experts a layer are too few.",
            cause=f"{bearing} layers carry experts and need one each, the total would be {total}",
        )
    shares = _schedule_weights(schedule, bearing, weights)
    # one expert is given to each bearing layer before the rest is shared out
    extra = largest_remainder([_above_minimum(share, sum(shares), total) for share in shares], total - bearing)
    return (0,) * free + tuple(1 + count for count in extra)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that sum to `total`: Hamilton's method, ties go to deeper layers."""
    whole = sum(shares)
    if whole <= 0:
        shares, whole = [1.0] * len(shares), float(len(shares))
    quotas = [share / whole * total for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (quotas[i] - counts[i], i), reverse=True)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _above_minimum(share: float, whole: float, total: int) -> float:
    """The part of a layer's proportional quota that exceeds the one expert it has already."""
    return max(0.0, share / whole * total - 1)


def _schedule_weights(schedule: str, bearing: int, weights: Sequence[float] | None) -> list[float]:
    if schedule == "data":
        if weights is None or len(weights) != bearing or min(weights) <= 0 or not all(map(math.isfinite, weights)):
            found = "none" if weights is None else list(weights)
            raise InputError(f"Schedule 'data' needs {bearing} positive weights, found {found}.")
        return [float(weight) for weight in weights]
    if weights is not None:
        raise InputError(f"Weights belong to schedule 'data', not to {schedule!r}.")
    if schedule == "uniform":
        return [1.0] * bearing
    if schedule == "linear":
        return [float(i + 1) for i in range(bearing)]
    if schedule == "quarters":
        return [2.0 * (1 + 4 * i // bearing) for i in range(bearing)]
    raise InputError(f"There is no schedule named {schedule!r}.", fix=f"choose one of: {', '.join(SCHEDULES)}")
