"""A retention report as a picture for slides and papers, through the optional package `matplotlib`."""

import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...domains.errors import InputError
from ..show.charts import HEAT_COLOURS, HEAT_LEVELS
from .formatting import format_interval, format_step, format_value, heat_levels
from .terminal import WIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ...registry.measure.report import RetentionReport, ScoreTable

_INK, _FAINT, _KEPT, _ORACLE = "#1c2427", "#5b676b", "#01665e", "#4056a8"
_DPI: Final = 160


def check_plot(path: Path) -> None:
    """Passes if a picture can be drawn into this file, so that nothing is measured in vain.

    Raises:
        InputError: matplotlib is not installed, or the file is to be something else than a PNG.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} would not be a PNG.", cause=f"it ends in {path.suffix!r}", fix="--png retention.png")
    if find_spec("matplotlib") is None:
        raise InputError(
            "--png needs the package 'matplotlib', which is not installed.",
            cause="it is optional: everything else works without it",
            fix="pip install 'lorary[plot]'",
        )


def retention_png(report: "RetentionReport") -> bytes:
    """Heat maps of the retention matrix, and the kept shares with their intervals below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tables = [report.bits, *([report.accuracy] if report.accuracy else [])]
    columns, steps = len(report.columns), len(report.steps)
    width = max(7.5, (0.66 if columns <= WIDE else 0.16) * sum(len(t.matrix.domains) for t in tables) + 3.5)
    tall = max(2.6, (0.36 if columns <= WIDE else 0.16) * steps + 1.2)
    low = max(1.8, 0.34 * len(report.domains) + 0.9)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.09)  # inches
    figure = Figure(figsize=(width, tall + low + 0.9), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(2, 1, height_ratios=[tall, low])
    above, below = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    widths = [len(table.matrix.domains) for table in tables]
    places = above.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    titles = ("bits per byte after each step, less is better", "accuracy, more is better")
    for place, scores, title in zip(places, tables, titles, strict=False):
        _heat_map(place, scores, title, names_steps=place is places[0])
    _shares(below.subplots(), report)
    _headline(figure, report)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _headline(figure: "Figure", report: "RetentionReport") -> None:
    words = []
    for name, label in (
        ("retention", "kept"),
        ("oracle_share", "of the oracle's gain"),
        ("general_delta", "general text"),
    ):
        whole = report.figure(name).whole
        if whole.value is not None:
            words.append(f"{label} {format_value(whole.value, 'share')} ({format_interval(whole.interval, 'share')})")
    figure.suptitle("   ·   ".join(words), color=_INK, fontsize=11, fontweight="bold")


def _heat_map(place: "Axes", scores: "ScoreTable", title: str, *, names_steps: bool) -> None:
    """One matrix: teal where a column is at its best, brown where it is worst, the learned cells outlined."""
    from matplotlib.patches import Rectangle

    matrix = scores.matrix
    columns = [heat_levels(scores, j, levels=HEAT_LEVELS) for j in range(len(matrix.domains))]
    unit = "bits/byte" if matrix.lower_is_better else "share"
    for j, levels in enumerate(columns):
        for i, level in enumerate(levels):
            if level is None:
                continue
            ink, paper = HEAT_COLOURS[level]
            place.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fc=paper, ec="white", lw=1))
            if i == matrix.learned[j]:
                place.add_patch(Rectangle((j - 0.46, i - 0.45), 0.92, 0.9, fc="none", ec=_INK, lw=1.5, zorder=2))
            if len(columns) <= WIDE:
                shown = format_value(scores.value(i, j), unit)
                place.text(j, i, shown, ha="center", va="center", fontsize=8, color=ink, zorder=3)
    place.set_xlim(-0.5, len(columns) - 0.5)
    place.set_ylim(len(matrix.steps) - 0.5, -0.5)
    size = 8 if len(columns) <= WIDE else 5
    place.set_xticks(
        range(len(columns)), [_plain(name) for name in matrix.domains], rotation=45, ha="left", fontsize=size
    )
    steps = [_plain(format_step(i, step)) for i, step in enumerate(matrix.steps)]
    place.set_yticks(range(len(steps)), steps if names_steps else [""] * len(steps), fontsize=size)
    place.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, colors=_INK)
    place.spines[:].set_visible(False)
    place.set_title(title, loc="left", fontsize=9, color=_FAINT, pad=8)


def _shares(place: "Axes", report: "RetentionReport") -> None:
    """What of each domain's gain is kept, and what routing keeps of it, with 95 % intervals."""
    series = (("retention", "kept", _KEPT, -0.14), ("oracle_share", "share of oracle gain", _ORACLE, 0.14))
    for name, label, colour, shift in series:
        values = report.figure(name).domains
        for j, domain in enumerate(report.domains):
            value = values.get(domain)
            if value is None or value.value is None:
                continue
            low, high = value.interval or (value.value, value.value)
            place.plot([low, high], [j + shift] * 2, color=colour, lw=1.8, alpha=0.55)
            place.plot([value.value], [j + shift], "o", ms=5, color=colour)
        place.plot([], [], "o", ms=5, color=colour, label=label)
    place.axvline(1, color=_FAINT, lw=0.8, ls=":")
    low, high = place.get_xlim()
    place.set_xlim(max(-0.5, min(low, 0.75)), min(1.5, max(high, 1.05)))
    place.set_yticks(range(len(report.domains)), [_plain(name) for name in report.domains], fontsize=8)
    place.set_ylim(len(report.domains) - 0.4, -0.6)
    place.xaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")
    place.tick_params(colors=_INK, labelsize=8, length=0)
    place.grid(axis="x", color="#e1e5e3", lw=0.6)
    place.set_axisbelow(True)
    place.spines[:].set_visible(False)
    place.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula."""
    return re.sub(r"([$\\])", r"\\\1", text)
