"""Small charts made of characters: bars, sparklines, and the colour levels of heat maps."""

import math
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
# text and background, from teal to brown; safe for colour-blind readers (ColorBrewer BrBG)
HEAT_COLOURS = (
    ("white", "#01665e"),
    ("black", "#5ab4ac"),
    ("black", "#c7eae5"),
    ("black", "#f6e8c3"),
    ("black", "#d8b365"),
    ("white", "#8c510a"),
)
HEAT_LEVELS = len(HEAT_COLOURS)


def bar(share: float, *, width: int = 24) -> str:
    """Draw a horizontal bar, `width` characters long for a share of 1.

    >>> bar(0.5, width=5)
    '██▌  '
    """
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[part] if part else "")).ljust(width)


def sparkline(values: Sequence[float], *, width: int = 48) -> str:
    """Draw a series of values, one character for each value or for the mean of several.

    >>> sparkline([4, 3, 2, 1])
    '█▆▃▁'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    means = [sum(part) / len(part) for part in _parts(finite, min(width, len(finite)))]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_HEIGHTS[round((value - low) / span * (len(_HEIGHTS) - 1))] for value in means)


def layers(counts: Sequence[int], *, highest: int | None = None, width: int = 48) -> str:
    """Draw a column for each decoder layer, the first layer on the left; a dot stands for zero.

    >>> layers([0, 0, 1, 2, 4])
    '··▂▄█'
    """
    top = max(highest or 0, *counts, 1)
    tallest = [max(part) for part in _parts(counts, min(width, len(counts)))]
    return "".join(_HEIGHTS[max(0, round(count / top * 8) - 1)] if count else "·" for count in tallest)


def heat(value: float, column: Sequence[float], *, levels: int = HEAT_LEVELS, min_span: float = 0.0) -> int:
    """Return the colour level of a value: 0 for the lowest of `column`, `levels` - 1 for its highest.

    The scale spans at least `min_span`.

    >>> [heat(v, [1.0, 2.0, 3.0]) for v in (1.0, 2.0, 3.0)]
    [0, 2, 5]
    >>> [heat(v, [1.0, 1.1], min_span=2.0) for v in (1.0, 1.1)]
    [0, 0]
    """
    low, high = min(column), max(column)
    span = max(high - low, min_span)
    share = (value - low) / span if span > 0 else 0.0
    return round(share * (levels - 1))


def _parts(values: Sequence, count: int) -> list[Sequence]:
    """Split the values into `count` consecutive parts of nearly equal length."""
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    return [values[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
