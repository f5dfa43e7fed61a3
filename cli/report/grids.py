"""Tables of a retention report as HTML: grids of cells with tooltips, and tables that can be sorted."""

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from ..show.numbers import bits, exact, percent
from .markup import Html, tag
from .views import heat_levels, show_interval, show_step, show_value

if TYPE_CHECKING:
    from ...registry.measure.report import RetentionReport, ScoreTable, Value
    from ...registry.measure.report_details import ReportDetails

WIDE: Final = 12  # columns from which a grid shows colours only: values are in its tooltips
LEVELS: Final = 9  # of colours in a heat map
_TINTS: Final = 5


def heat_grid(scores: "ScoreTable", name: str) -> Html:
    """The retention matrix: a row after each step, a column for each domain, teal where it is predicted best."""
    matrix = scores.matrix
    levels = [heat_levels(scores, j, levels=LEVELS) for j in range(len(matrix.domains))]
    rows = [
        (show_step(i, step), [_heat_cell(scores, i, j, column[i]) for j, column in enumerate(levels)])
        for i, step in enumerate(matrix.steps)
    ]
    headings = [(domain, f"n = {scores.counts[domain]}") for domain in matrix.domains]
    return _grid(name, "after", headings, rows)


def _heat_cell(scores: "ScoreTable", step: int, column: int, level: int | None) -> Html:
    if level is None:
        return tag("td")
    value, interval = scores.value(step, column), scores.intervals[step][column]
    kind = f"h{level} own" if step == scores.matrix.learned[column] else f"h{level}"
    unit = "bits/byte" if scores.matrix.lower_is_better else "share"
    return tag("td", show_value(value, unit), class_=kind, data_t=f"95 % {show_interval(interval, unit)}")


def confusion_grid(report: "RetentionReport") -> Html:
    """Held-out texts by true domain and by the slot that takes most of them; mean gates in the tooltips."""
    rows = []
    for true in report.columns:
        taken, gates = report.confusion[true], report.mean_gates[true]
        texts = sum(taken.values())
        cells = []
        for slot in report.columns:
            count, gate = taken.get(slot, 0), gates.get(slot, 0.0)
            tint = max(1, round(count / texts * _TINTS)) if count else 0
            kind = f"{'r' if slot == true else 'w'}{tint}" if tint else None
            about = f"mean gate {percent(gate, digits=1)}" if count or gate >= 0.0005 else None
            cells.append(tag("td", str(count) if count else None, class_=kind, data_t=about))
        rows.append((true, cells))
    return _grid("Where held-out texts go", "texts of", [(name, "") for name in report.columns], rows)


def layers_grid(details: "ReportDetails") -> Html:
    """Experts of every decoder layer, a bar for each with the height of its mean gate."""
    depth = max(len(layers) for layers in details.gates.values())
    most = max(len(gates) for layers in details.gates.values() for gates in layers)
    highest = max(gate for layers in details.gates.values() for gates in layers for gate in gates)
    rows = [(name, [_layer_cell(gates, most, highest) for gates in layers]) for name, layers in details.gates.items()]
    headings = [(str(index), "") for index in range(depth)]
    return _grid("Experts by decoder layer", "layer", headings, rows, kind="layers", is_wide=depth > 40)


def _layer_cell(gates: Sequence[float], most: int, highest: float) -> Html:
    if not gates:
        return tag("td", class_="none")
    bars = "".join(f"M{4 + 7 * i} 30v-{max(1, round(gate / highest * 28))}" for i, gate in enumerate(gates))
    width = 7 * len(gates) + 1
    picture = tag("svg", tag("path", d=bars), viewBox=f"0 0 {width} 30", width=width, height=30, aria_hidden="true")
    about = f"mean gates {' '.join(f'{gate:.2f}' for gate in gates)}"
    tint = max(1, round(len(gates) / most * _TINTS))
    return tag("td", picture, tag("span", str(len(gates))), class_=f"e{tint}", data_t=about)


def domains_table(report: "RetentionReport") -> Html:
    """What became of each domain, with intervals; every column can be sorted by."""
    columns = ["Domain", "Base", "Learned", "Now", "Kept", "Oracle", "Backward", "Forgotten", "Forward"]
    columns += [*(["Right before", "Right now"] if report.accuracy else []), "Routed"]
    figures = {figure.name: figure for figure in report.figures}
    units = {"retention": "share", "oracle_share": "share"}
    units |= dict.fromkeys(("backward_transfer", "forgetting", "forward_transfer"), "bits/byte")
    last = len(report.steps) - 1
    rows = []
    for j, name in enumerate(report.columns):
        base, learned, now = (report.bits.value(i, j) for i in (0, j + 1, last))
        cells = [
            number(bits(base), base),
            number(bits(learned), learned),
            number(bits(now), now, show_interval(report.bits.intervals[last][j], "bits/byte")),
            *(value_cell(figures[figure].domains.get(name), unit) for figure, unit in units.items()),
            *(_questions(report.accuracy, name) if report.accuracy else []),
            value_cell(figures["routing_accuracy"].domains[name], "share"),
        ]
        rows.append(("general text" if j == 0 else name, cells))
    return sortable(columns, rows, "Domains", numeric=range(1, len(columns)))


def _questions(scores: "ScoreTable", name: str) -> list[Html]:
    """Accuracy before and after."""
    if name not in scores.matrix.domains:
        return [number("-", None), number("-", None)]
    j, last = scores.matrix.domains.index(name), len(scores.matrix.steps) - 1
    before, after = scores.value(0, j), scores.value(last, j)
    return [
        number(percent(before), before),
        number(percent(after), after, show_interval(scores.intervals[last][j], "share")),
    ]


def number(shown: str, value: float | None, interval: str = "") -> Html:
    """A cell with a number to sort by, and its interval."""
    small = tag("small", interval) if interval not in ("", "-") else None
    return tag("td", shown, small, data_v=exact(value), class_="n")


def value_cell(value: "Value | None", unit: str) -> Html:
    """A cell with a figure in its unit, and its interval."""
    if value is None:
        return number("-", None)
    return number(show_value(value.value, unit), value.value, show_interval(value.interval, unit))


def sortable(
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Html]]],
    name: str,
    *,
    numeric: Container[int] = (),
) -> Html:
    """A table whose headings sort it: by the numbers of `numeric` columns, else by text."""
    head = [
        tag("th", tag("button", title, type="button"), scope="col", aria_sort="none", class_=i in numeric and "n")
        for i, title in enumerate(columns)
    ]
    body = [tag("tr", tag("th", title, scope="row"), cells) for title, cells in rows]
    return scroller(tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="sortable"), name)


def scroller(inside: Html, name: str) -> Html:
    """What may be wider than the screen: it scrolls alone, also by keyboard."""
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=name)


def _grid(
    name: str,
    corner: str,
    headings: Sequence[tuple[str, str]],
    rows: Iterable[tuple[str, Sequence[Html]]],
    *,
    kind: str = "",
    is_wide: bool | None = None,
) -> Html:
    """Cells by row and column; arrow keys go from one to the next, and each tells more about itself."""
    wide = len(headings) > WIDE if is_wide is None else is_wide
    head = [tag("th", tag("span", title), scope="col", data_n=about or None) for title, about in headings]
    body = [tag("tr", tag("th", title, scope="row"), cells) for title, cells in rows]
    corner_cell = tag("th", corner, scope="col", class_="corner")
    classes = " ".join(filter(None, ["grid", kind, "wide" if wide else ""]))
    table = tag("table", tag("thead", tag("tr", corner_cell, head)), tag("tbody", body), class_=classes)
    return scroller(table, name)
