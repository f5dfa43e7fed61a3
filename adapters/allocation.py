"""Allocation of experts to decoder layers: more in deeper layers, with an exact total.

The first layers can stay without experts (`expert_free`). That is cheaper, and the domain router reads the hidden state
after these layers, which then depends on the frozen base model only.

A schedule weighs the layers with experts; largest-remainder rounding turns the weights into counts that have the exact
total and give each of these layers at least one expert:

    uniform    1, 1, 1, ...
    linear     1, 2, 3, ...
    quarters   2, 4, 6, 8 by quarter of the layers (MoLA, arXiv:2402.08562)
    data       weights measured on the domain's text (adapters/training/warm_start.py)
"""

import math
from collections.abc import Collection, Sequence

from ..domains.errors import InputError

MAX_EXPERTS = 1024  # mean per layer; a typing error should not exhaust the memory
SCHEDULES = ("linear", "quarters", "uniform", "data")


def expert_free_layers(layers: int, fraction: float) -> int:
    """Return the number of first layers without experts: `fraction` of all, rounded, at most all but one."""
    if not 0 <= fraction < 1:
        raise InputError(f"expert_free must be in [0, 1), found {fraction}.")
    return min(layers - 1, round(layers * fraction))


def bearing_layers(layers: int, fraction: float, without: Collection[int] = ()) -> tuple[int, ...]:
    """Return the layers that get experts.

    Args:
        layers: Number of decoder layers.
        fraction: Fraction of the layers, from the input, without experts.
        without: Layers in which no module can have experts.

    Raises:
        InputError: No layer is left.
    """
    free = expert_free_layers(layers, fraction)
    found = tuple(layer for layer in range(free, layers) if layer not in without)
    if not found:
        raise InputError(
            "No decoder layer can have experts.",
            cause=f"the first {free} are free of experts, and none of the other {layers - free} has a target module",
            fix="choose a smaller --expert-free, or other --targets",
        )
    return found


def allocate(
    layers: int,
    *,
    experts: float,
    schedule: str,
    expert_free: float,
    weights: Sequence[float] | None = None,
    without: Collection[int] = (),
) -> tuple[int, ...]:
    """Return the number of experts of each decoder layer.

    Args:
        layers: Number of decoder layers of the base model.
        experts: Mean number of experts over the layers that have any; `round(experts * their number)` is the total.
        schedule: One of `SCHEDULES`.
        expert_free: Fraction of the layers, from the input, without experts.
        weights: For schedule `data` only: one positive weight for each layer with experts.
        without: Layers in which no module can have experts.

    Raises:
        InputError: The schedule is unknown, the total is too small or too large, or the weights do not fit.
    """
    chosen = bearing_layers(layers, expert_free, without)
    bearing = len(chosen)
    if not experts <= MAX_EXPERTS:  # also true for nan
        raise InputError(f"experts must be at most {MAX_EXPERTS:,} per layer, found {experts:,}.")
    total = round(experts * bearing)
    if total < bearing:
        raise InputError(
            f"{experts} experts per layer are too few.",
            cause=f"{bearing} layers need at least one expert each, the total would be {total}",
        )
    shares = _schedule_weights(schedule, bearing, weights)
    # each layer gets one expert first, the rest is distributed in proportion
    extra = largest_remainder([_excess_quota(share, sum(shares), total) for share in shares], total - bearing)
    counts = dict(zip(chosen, extra, strict=True))
    return tuple(1 + counts[layer] if layer in counts else 0 for layer in range(layers))


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Round `shares` to integers with sum `total` by Hamilton's method; ties go to deeper layers."""
    whole = sum(shares)
    if whole <= 0:
        shares, whole = [1.0] * len(shares), float(len(shares))
    quotas = [share / whole * total for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (quotas[i] - counts[i], i), reverse=True)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _excess_quota(share: float, whole: float, total: int) -> float:
    """Return the part of a layer's proportional quota that exceeds the one expert it already has."""
    return max(0.0, share / whole * total - 1)


def _schedule_weights(schedule: str, bearing: int, weights: Sequence[float] | None) -> list[float]:
    if schedule == "data":
        if weights is None or len(weights) != bearing or min(weights) <= 0 or not all(map(math.isfinite, weights)):
            found = "none" if weights is None else list(weights)
            raise InputError(f"Schedule 'data' needs {bearing} positive weights, found {found}.")
        return [float(weight) for weight in weights]
    if weights is not None:
        raise InputError(f"Layer weights are for schedule 'data' only, the schedule is {schedule!r}.")
    if schedule == "uniform":
        return [1.0] * bearing
    if schedule == "linear":
        return [float(i + 1) for i in range(bearing)]
    if schedule == "quarters":
        return [2.0 * (1 + 4 * i // bearing) for i in range(bearing)]
    raise InputError(f"There is no schedule named {schedule!r}.", fix=f"choose one of: {', '.join(SCHEDULES)}")
