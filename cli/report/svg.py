"""The heat maps and kept shares of a retention report as one SVG file, for documents and slides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .formatting import format_figure, format_step, format_value, heat_levels, score_unit, worse_columns
from .grids import HEAT_LEVELS, MAX_COLUMNS
from .pictures import Picture, Shape, circle, rectangle, shares_picture, text
from .templates import read_asset, render

if TYPE_CHECKING:
    from ...registry.measure.report import RetentionReport, ScoreTable

_LEFT: Final = 150  # room for the names of the rows
_EDGE: Final = 16
_GAP: Final = 36  # between the two heat maps
_MIN_WIDTH: Final = 680  # of the headline and the legends


def retention_svg(report: "RetentionReport") -> str:
    """Render the picture; it has a white background and loads nothing."""
    return render("report.svg.jinja", picture=retention_picture(report), style=read_asset("picture.css"))


def retention_picture(report: "RetentionReport") -> Picture:
    """Draw a heat map for each kind of score, and the kept shares below."""
    titles = ("bits per byte after each step (lower is better)", "accuracy (higher is better)")
    tables = [report.bits, *([report.accuracy] if report.accuracy else [])]
    left = _EDGE + _LEFT
    top = 68 + _heading_height(report.columns)
    style = "headline bad" if report.worse else "headline"
    shapes: list[Shape] = [text(_headline(report), _EDGE, 28, style=style)]
    x = left
    for table, title in zip(tables, titles, strict=False):
        shapes.append(text(title, x, 56, style="caption"))
        shapes += _heat_map(report, table, x, top)
        map_width = _cell_size(table)[0] * len(table.matrix.domains)
        x += max(map_width, 6.5 * len(title)) + _GAP  # the caption may be the wider of the two
    bottom = top + max(_cell_size(table)[1] for table in tables) * len(report.steps)
    shares = shares_picture(report)
    shapes += _heat_legend(left, bottom + 14)
    shapes += _shares_legend(left, bottom + 66)
    shapes.append(Shape(tag="g", place={"transform": f"translate({_EDGE} {bottom + 76:g})"}, shapes=shares.shapes))
    width = max(round(x), shares.width + 2 * _EDGE, _MIN_WIDTH)
    height = round(bottom + 76 + shares.height + _EDGE)
    return Picture(title="Retention report", width=width, height=height, style="", shapes=shapes)


def _headline(report: "RetentionReport") -> str:
    labels = {"retention": "gain retained", "oracle_share": "oracle's gain reached", "general_delta": "general text"}
    values = {name: report.figure(name).whole for name in labels}
    parts = [f"{labels[name]}: {format_figure(value, 'share')}" for name, value in values.items()]
    names = dict.fromkeys(change.domain for change in report.worse)
    return " · ".join([*([f"worse: {', '.join(names)}"] if names else []), *parts])


def _heading_height(names: Sequence[str]) -> float:
    """Return the height of the column names, which are tilted by 35 degrees."""
    return min(110.0, 18 + 4.4 * max(map(len, names)))


def _cell_size(scores: "ScoreTable") -> tuple[int, int]:
    """Return width and height of a cell; many columns are drawn without their values."""
    return (62, 28) if len(scores.matrix.domains) <= MAX_COLUMNS else (14, 14)


def _heat_map(report: "RetentionReport", scores: "ScoreTable", left: float, top: float) -> list[Shape]:
    """Draw one matrix, with the step at which each domain was learned outlined, and what got worse in red."""
    matrix, unit = scores.matrix, score_unit(scores)
    worse = worse_columns(report, scores)
    width, height = _cell_size(scores)
    shapes: list[Shape] = []
    for j, domain in enumerate(matrix.domains):
        x = left + width * j
        shapes.append(_tilted(domain, x + width / 2, top - 8))
        for i, level in enumerate(heat_levels(scores, j, levels=HEAT_LEVELS)):
            if level is None:
                continue
            y = top + height * i
            value = format_value(scores.value(i, j), unit)
            tip = f"{domain}, {format_step(i, matrix.steps[i])}: {value}"
            own = " own" * (i == matrix.learned[j])
            if i == matrix.last and j in worse:
                own, tip = f"{own} worse", f"{tip}, worse"
            shapes.append(rectangle(x + 1, y + 1, width - 2, height - 2, style=f"h{level}{own}", title=tip))
            if height > 20:
                shapes.append(text(value, x + width / 2, y + 18, style=f"t{level}", anchor="middle"))
    if scores is report.bits:
        for i, step in enumerate(matrix.steps):
            middle = top + height * i + height / 2
            shapes.append(text(format_step(i, step), left - 10, middle + 4, style="label", anchor="end"))
    return shapes


def _tilted(words: str, x: float, y: float) -> Shape:
    return Shape(tag="text", place={"transform": f"translate({x:g} {y:g}) rotate(-35)"}, style="label", text=words)


def _heat_legend(x: float, y: float) -> Sequence[Shape]:
    swatches = [rectangle(x + 34 + 20 * i, y, 18, 11, style=f"h{i}") for i in range(HEAT_LEVELS)]
    learned = rectangle(x + 348, y, 18, 11, style="paper own")
    labels = {"best": 0, "worst of a column": 222, "when learned": 374}
    return *swatches, learned, *(text(words, x + shift, y + 10, style="tick") for words, shift in labels.items())


def _shares_legend(x: float, y: float) -> Sequence[Shape]:
    return (
        circle(x + 6, y - 4, 5, style="kept"),
        text("share of the gain when learned", x + 18, y, style="tick"),
        circle(x + 226, y - 4, 5, style="oracle"),
        text("share of the oracle's gain", x + 238, y, style="tick"),
    )
