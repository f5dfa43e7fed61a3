"""Decide whether a share of a gain can be measured: whether its denominator is more than noise.

A share divides by a gain. Where that gain is not told from zero, the quotient is any number, such as 482 for a domain
that learned nothing; so it is not computed. Nothing heavy is imported.
"""

import math
from typing import Final

NOT_MEASURABLE: Final = "not measurable"  # what is shown in place of a number
MIN_TEXTS: Final = 5  # below, the bootstrap has too few different draws for an interval
SMALL_SAMPLE: Final = 20  # texts or questions; figures of fewer are marked
MIN_GAIN: Final = 0.001  # share of the base's bits per byte: models differ by as much through rounding


def why_not_measurable(
    gain: float, interval: tuple[float, float] | None, *, texts: int, base: float | None
) -> str | None:
    """Return why a share of this gain is not measurable; None if it is.

    Args:
        gain: The denominator, positive where something was gained.
        interval: Its 95 % interval; None if there is none.
        texts: Number of texts or questions.
        base: The base's bits per byte, or None for accuracies.
    """
    if not math.isfinite(gain):
        return "the gain is not a number"
    if texts < MIN_TEXTS:
        return f"n = {texts}, and at least {MIN_TEXTS} are needed to tell a gain from chance"
    if gain <= 0:
        return f"there is no gain over the base ({gain:+.4f})"
    low, high = interval or (-math.inf, math.inf)
    if not low > 0:
        return f"the gain of {gain:.4f} is not told from zero: 95 % {low:.4f} to {high:.4f}, n = {texts}"
    if base is not None and gain < MIN_GAIN * base:
        return f"the gain of {gain:.5f} is below {MIN_GAIN:.1%} of the base's {base:.3f} bits per byte"
    return None
