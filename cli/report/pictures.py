"""Pictures of a retention report as inline SVG: kept shares with intervals, the prototype map, the lineage."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..show.numbers import percent
from ..show.page import slot_style
from .markup import Html, tag

if TYPE_CHECKING:
    from ...registry.measure.report import RetentionReport, Value
    from ...registry.measure.report_details import Points, ReportDetails

MAX_LABELS: Final = 24  # domains on a map that are named beside their points; of more, the names are tooltips
_CLIP: Final = (-0.5, 1.5)  # shares outside are drawn at the edge


def shares_picture(report: "RetentionReport") -> Html:
    """Each domain's kept share and share of the oracle's gain, with 95 % intervals, on one axis."""
    series = [("kept", "retention", -7), ("oracle", "oracle_share", 7)]
    values = {name: report.figure(figure).domains for name, figure, _ in series}
    bounds = [b for of in values.values() for v in of.values() if v.value is not None for b in (v.interval or ())]
    low = max(_CLIP[0], min([0.75, *bounds]) - 0.02)
    high = min(_CLIP[1], max([1.05, *bounds]) + 0.02)
    left, width, step = 150, 600, 38
    bottom = 34 + step * len(report.domains)

    def x(share: float) -> float:
        return round(left + (min(max(share, low), high) - low) / (high - low) * (width - left - 20), 1)

    parts: list[Html] = []
    for tick in _ticks(low, high):
        parts.append(_line(x(tick), 26, x(tick), bottom, "axis one" if tick == 1 else "axis"))
        parts.append(_text(percent(tick), x(tick), 16, "tick", anchor="middle"))
    for row, name in enumerate(report.domains):
        y = 34 + step * row + step / 2
        parts.append(_text(name, left - 14, y + 4, "label", anchor="end"))
        for kind, figure, shift in series:
            parts += _whisker(values[kind].get(name), figure, y + shift, kind, x)
    return _svg(width, bottom + 8, "Kept share and share of the oracle's gain of each domain", parts, "shares")


def _whisker(value: "Value | None", title: str, y: float, kind: str, x: Any) -> list[Html]:
    """A dot with its interval."""
    if value is None or value.value is None:
        return []
    low, high = value.interval or (value.value, value.value)
    about = f"{title.replace('_', ' ')} {percent(value.value, digits=1)}, 95 % {percent(low)} to {percent(high)}"
    dot = tag("circle", tag("title", about), cx=x(value.value), cy=y, r=5, class_=kind)
    return [_line(x(low), y, x(high), y, f"whisker {kind}"), dot]


def prototype_map(details: "ReportDetails") -> Html:
    """All prototypes in their principal plane, a colour for each domain, names at their middle."""
    width, height, edge = 560, 430, 30
    spread = [abs(number) for points in details.places.values() for number in points.ravel().tolist()]
    every = [point for points in details.places.values() for point in points.tolist()]
    xs, ys = [point[0] for point in every], [point[1] for point in every]
    span = max((max(xs) - min(xs)) / (width - 2 * edge), (max(ys) - min(ys)) / (height - 2 * edge), max(spread) * 1e-6)
    span = span or 1.0  # all in one place
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2

    def place(point: Sequence[float]) -> tuple[int, int]:
        return round(width / 2 + (point[0] - middle[0]) / span), round(height / 2 - (point[1] - middle[1]) / span)

    clouds = [
        tag(
            "path",
            tag("title", name),
            d="".join(f"M{a} {b}h0" for a, b in map(place, points.tolist())),
            class_=slot_style(i),
        )
        for i, (name, points) in enumerate(details.places.items())
    ]
    labels = _labels(details.places, place) if len(details.places) <= MAX_LABELS else []
    return _svg(width, height, "Prototypes of all domains in their principal plane", [*clouds, *labels], "map")


def _labels(places: "Mapping[str, Points]", place: Any) -> list[Html]:
    """Names at the mean of their points, moved down where they would touch another."""
    at = sorted((place(points.mean(0).tolist()), i, name) for i, (name, points) in enumerate(places.items()))
    put: list[tuple[float, float, float]] = []
    labels = []
    for (a, b), i, name in at:
        half = 4.2 * len(name)
        while any(abs(b - other) < 17 and abs(a - across) < half + wide for across, other, wide in put):
            b += 4
        put.append((a, b, half))
        labels.append(_text(name, a, b + 4, f"name {slot_style(i)}", anchor="middle"))
    return labels


def lineage_picture(history: Mapping[str, Sequence[Mapping[str, Any]]], measured: Mapping[str, int]) -> Html:
    """Versions of every domain from left to right; a line leads from a version to the one retrained from it.

    Args:
        history: By domain, what `registry log` says of its versions, oldest first.
        measured: The versions that the report is about.
    """
    left, column, row = 150, 118, 58
    newest = max(version["version"] for versions in history.values() for version in versions)
    parts: list[Html] = []
    for i, (name, versions) in enumerate(history.items()):
        y = 26 + row * i
        parts.append(_text(name, left - 26, y + 5, "label", anchor="end"))
        for version in versions:
            x = left + column * (version["version"] - 1)
            if version["parent"]:
                parts += _descent(left + column * (version["parent"] - 1), x, y, version["mode"] or "")
            parts.append(_version(version, x, y, is_measured=measured.get(name) == version["version"]))
            state = _state(version)
            parts.append(_text(state, x, y + 29, f"state {state.replace(' ', '-')}", anchor="middle"))
    return _svg(left + column * newest, row * len(history), "Versions and where they come from", parts, "lineage")


def _version(version: Mapping[str, Any], x: float, y: float, *, is_measured: bool) -> Html:
    about = f"{version['name']}@{version['version']}, {version['created'][:10]}{', measured here' * is_measured}"
    kind = f"version {_state(version).replace(' ', '-')}{' measured' * is_measured}"
    circle = tag("circle", cx=x, cy=y, r=13)
    return tag("g", tag("title", about), circle, _text(str(version["version"]), x, y + 4, anchor="middle"), class_=kind)


def _descent(start: float, end: float, y: float, mode: str) -> list[Html]:
    """From a parent to the version retrained from it: a line, or an arc over the versions between."""
    lift = 0 if end - start < 130 else 20
    path = f"M{start + 13} {y}Q{(start + end) / 2:g} {y - 2 * lift} {end - 13} {y}"
    return [
        tag("path", d=path, class_="descent"),
        _text(mode, (start + end) / 2, y - lift - 5, "mode", anchor="middle"),
    ]


def _state(version: Mapping[str, Any]) -> str:
    if version["removed"]:
        return "removed"
    if version["held_back"] and not version["aliases"]:
        return "held back"
    return ", ".join(version["aliases"]) or "older"


def _ticks(low: float, high: float) -> list[float]:
    size = next(size for size in (0.05, 0.1, 0.25, 0.5) if (high - low) / size <= 9 or size == 0.5)
    return [i * size for i in range(-10, 40) if low <= i * size <= high]


def _svg(width: float, height: float, label: str, parts: Sequence[Html], kind: str) -> Html:
    box = f"0 0 {width:g} {height:g}"
    return tag(
        "svg", parts, viewBox=box, width=f"{width:g}", height=f"{height:g}", class_=kind, role="img", aria_label=label
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(text: str, x: float, y: float, kind: str | None = None, *, anchor: str | None = None) -> Html:
    return tag("text", text, x=f"{x:g}", y=f"{y:g}", class_=kind, text_anchor=anchor)
