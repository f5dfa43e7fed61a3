"""Pictures of the report as shapes of SVG: kept shares with intervals, the prototype map, the lineage.

`picture.svg.jinja` draws them and escapes their text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from ...registry.measure.measurable import NOT_MEASURABLE
from ..show.numbers import percent
from ..show.page import slot_style

if TYPE_CHECKING:
    from ...registry.maintenance.log import LogEntry
    from ...registry.measure.report import RetentionReport, Value
    from ...registry.measure.report_details import Points, ReportDetails

MAX_LABELS: Final = 24  # domains on a map that are named beside their points; with more, the names are tooltips
_CLIP: Final = (-0.5, 1.5)  # shares outside are drawn at the edge
_KINDS: Final = (("kept", "retention", -7), ("oracle", "oracle_share", 7))  # style, figure, offset


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One element of SVG."""

    tag: Literal["circle", "g", "line", "path", "rect", "text"]
    place: Mapping[str, str] = field(default_factory=dict)  # its attributes
    style: str = ""  # CSS classes
    title: str = ""  # tooltip
    text: str = ""
    shapes: "Sequence[Shape]" = ()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An SVG image."""

    title: str
    width: int
    height: int
    style: str
    shapes: Sequence[Shape]


def shares_picture(report: "RetentionReport") -> Picture:
    """Draw each domain's kept share and share of the oracle's gain, with 95 % intervals, on one axis."""
    values = {style: report.figure(figure).domains for style, figure, _ in _KINDS}
    bounds = [
        bound
        for by_domain in values.values()
        for value in by_domain.values()
        if value.value is not None
        for bound in (value.interval or ())
    ]
    low = max(_CLIP[0], min([0.75, *bounds]) - 0.02)
    high = min(_CLIP[1], max([1.05, *bounds]) + 0.02)
    left, width, step = 150, 600, 38
    bottom = 34 + step * len(report.domains)

    def x(share: float) -> float:
        return round(left + (min(max(share, low), high) - low) / (high - low) * (width - left - 20), 1)

    shapes: list[Shape] = []
    for tick in _ticks(low, high):
        shapes.append(line(x(tick), 26, x(tick), bottom, style="axis one" if tick == 1 else "axis"))
        shapes.append(text(percent(tick), x(tick), 16, style="tick", anchor="middle"))
    for row, name in enumerate(report.domains):
        y = 34 + step * row + step / 2
        is_worse = any(change.domain == name for change in report.worse)
        words = f"{name}: worse" if is_worse else name
        shapes.append(text(words, left - 14, y + 4, style="label bad" if is_worse else "label", anchor="end"))
        for style, figure, offset in _KINDS:
            shapes += _whisker(values[style].get(name), figure, y + offset, style, x)
    title = "Kept share and share of the oracle's gain of each domain"
    return Picture(title=title, width=width, height=bottom + 8, style="shares", shapes=shapes)


def _whisker(value: "Value | None", figure: str, y: float, style: str, x: Callable[[float], float]) -> Sequence[Shape]:
    """Draw a dot with its interval."""
    if value is not None and value.reason is not None:
        words = f"{figure.replace('_', ' ')}: {NOT_MEASURABLE}"
        return (text(words, x(-math.inf) + 8, y + 4, style="tick warn"),)
    if value is None or value.value is None:
        return ()
    low, high = value.interval or (value.value, value.value)
    tip = f"{figure.replace('_', ' ')} {percent(value.value, digits=1)}, 95 % {percent(low)} to {percent(high)}"
    dot = circle(x(value.value), y, 5, style=style, title=tip)
    return line(x(low), y, x(high), y, style=f"whisker {style}"), dot


def prototype_map(details: "ReportDetails") -> Picture:
    """Draw all prototypes in their principal plane, a colour for each domain, its name at their mean."""
    width, height, edge = 560, 430, 30
    points = [point for cloud in details.places.values() for point in cloud.tolist()]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    largest = max(map(abs, (*xs, *ys)))
    scale = max((max(xs) - min(xs)) / (width - 2 * edge), (max(ys) - min(ys)) / (height - 2 * edge), largest * 1e-6)
    scale = scale or 1.0  # all points are at the origin
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2

    def place(point: Sequence[float]) -> tuple[int, int]:
        return round(width / 2 + (point[0] - middle[0]) / scale), round(height / 2 - (point[1] - middle[1]) / scale)

    clouds = [
        path("".join(f"M{a} {b}h0" for a, b in map(place, cloud.tolist())), style=slot_style(i), title=name)
        for i, (name, cloud) in enumerate(details.places.items())
    ]
    labels = _labels(details.places, place) if len(details.places) <= MAX_LABELS else []
    title = "Prototypes of all domains in their principal plane"
    return Picture(title=title, width=width, height=height, style="map", shapes=[*clouds, *labels])


def _labels(places: "Mapping[str, Points]", place: Callable[[Sequence[float]], tuple[int, int]]) -> list[Shape]:
    """Write names at the mean of their points, moved down where they would touch another."""
    means = sorted((place(cloud.mean(0).tolist()), i, name) for i, (name, cloud) in enumerate(places.items()))
    taken: list[tuple[float, float, float]] = []
    labels = []
    for (x, y), i, name in means:
        half = 4.2 * len(name)
        while any(abs(y - other_y) < 17 and abs(x - other_x) < half + other for other_x, other_y, other in taken):
            y += 4
        taken.append((x, y, half))
        labels.append(text(name, x, y + 4, style=f"name {slot_style(i)}", anchor="middle"))
    return labels


def lineage_picture(history: Mapping[str, "Sequence[LogEntry]"], measured: Mapping[str, int]) -> Picture:
    """Draw the versions of every domain from left to right, with a line from each parent to what was retrained from it.

    Args:
        history: By domain, its log, oldest version first.
        measured: The versions that the report measured.
    """
    left, column, row = 150, 118, 58
    newest = max(entry.version for versions in history.values() for entry in versions)
    shapes: list[Shape] = []
    for i, (name, versions) in enumerate(history.items()):
        y = 26 + row * i
        shapes.append(text(name, left - 26, y + 5, style="label", anchor="end"))
        for entry in versions:
            x = left + column * (entry.version - 1)
            if entry.parent:
                shapes += _descent(left + column * (entry.parent - 1), x, y, entry.mode or "")
            shapes.append(_version(entry, x, y, is_measured=measured.get(name) == entry.version))
            state = _state(entry)
            shapes.append(text(state, x, y + 29, style=f"state {state.replace(' ', '-')}", anchor="middle"))
    width, height = left + column * newest, row * len(history)
    return Picture(title="Version lineage", width=width, height=height, style="lineage", shapes=shapes)


def _version(entry: "LogEntry", x: float, y: float, *, is_measured: bool) -> Shape:
    tip = f"{entry.name}@{entry.version}, {entry.created[:10]}{', measured here' * is_measured}"
    style = f"version {_state(entry).replace(' ', '-')}{' measured' * is_measured}"
    number = text(str(entry.version), x, y + 4, anchor="middle")
    return Shape(tag="g", style=style, title=tip, shapes=(circle(x, y, 13), number))


def _descent(start: float, end: float, y: float, mode: str) -> Sequence[Shape]:
    """Draw the way from a parent to a version: a line, or an arc over the versions between."""
    lift = 0 if end - start < 130 else 20
    arc = f"M{start + 13} {y}Q{(start + end) / 2:g} {y - 2 * lift} {end - 13} {y}"
    label = text(mode, (start + end) / 2, y - lift - 5, style="mode", anchor="middle")
    return path(arc, style="descent"), label


def _state(entry: "LogEntry") -> str:
    if entry.removed:
        return "removed"
    if entry.held_back and not entry.aliases:
        return "held back"
    return ", ".join(entry.aliases) or "older"


def _ticks(low: float, high: float) -> list[float]:
    size = next(size for size in (0.05, 0.1, 0.25, 0.5) if (high - low) / size <= 9 or size == 0.5)
    return [i * size for i in range(-10, 40) if low <= i * size <= high]


def line(x1: float, y1: float, x2: float, y2: float, *, style: str) -> Shape:
    """Make a line."""
    return Shape(tag="line", place=_numbers(x1=x1, y1=y1, x2=x2, y2=y2), style=style)


def circle(x: float, y: float, radius: float, *, style: str = "", title: str = "") -> Shape:
    """Make a circle."""
    return Shape(tag="circle", place=_numbers(cx=x, cy=y, r=radius), style=style, title=title)


def rectangle(x: float, y: float, width: float, height: float, *, style: str, title: str = "") -> Shape:
    """Make a rectangle with round corners."""
    return Shape(tag="rect", place=_numbers(x=x, y=y, width=width, height=height, rx=3), style=style, title=title)


def path(d: str, *, style: str, title: str = "") -> Shape:
    """Make a path of SVG's path commands."""
    return Shape(tag="path", place={"d": d}, style=style, title=title)


def text(words: str, x: float, y: float, *, style: str = "", anchor: str = "") -> Shape:
    """Make a text at a point of its base line: its start, or `middle` or `end` as `anchor` says."""
    place = _numbers(x=x, y=y) | ({"text-anchor": anchor} if anchor else {})
    return Shape(tag="text", place=place, style=style, text=words)


def _numbers(**values: float) -> dict[str, str]:
    return {name: f"{value:g}" for name, value in values.items()}
