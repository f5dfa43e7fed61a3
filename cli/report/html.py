"""A retention report as one HTML page that can be mailed: it loads nothing, and works from a disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..show.numbers import brief, plural, size
from .grids import LEVELS, confusion_grid, domains_table, heat_grid, layers_grid, number, scroller, sortable, value_cell
from .markup import Html, document, join, tag
from .pictures import lineage_picture, prototype_map, shares_picture
from .views import show_failed, show_interval, show_value

if TYPE_CHECKING:
    from ...registry.measure.report import Figure, RetentionReport
    from ...registry.measure.report_details import ReportDetails
    from ...registry.measure.thresholds import Verdict
    from ...registry.store.manifest import BaseRecord

CARDS: Final = (
    "retention",
    "oracle_share",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "general_delta",
    "routing_accuracy",
    "accuracy_average_score",
    "average_score",
    "drift_kl",
)
HALVES: Final = ("routing", "prototypes", "layers", "versions")  # sections that stand two by two where there is room
MAX_LINES: Final = 24  # domains whose lineage is drawn; of more, those that were retrained
SYMBOLS: Final = (
    ("R[i, j]", "score on domain j after step i; bits per byte of held-out text (less is better), or accuracy"),
    ("i, T", "a step: 0 is the bare base model, 1 the knowledge-preservation bank, then the domains; T is the last"),
    ("L(j)", "the step at which domain j was learned; outlined in the heat map"),
    ("G[i, j]", "gain over the base: R[0, j] - R[i, j] for bits per byte, R[i, j] - R[0, j] for accuracy"),
)


@dataclass(frozen=True, kw_only=True)
class PageSource:
    """Everything that is on the page."""

    report: "RetentionReport"
    verdicts: "Sequence[Verdict]"
    details: "ReportDetails"
    history: Mapping[str, Sequence[Mapping[str, Any]]]  # by domain, versions oldest first, as `registry log` has them
    base: "BaseRecord"
    created: str  # time, ISO 8601
    version: str  # of this program


def retention_html(source: PageSource) -> str:
    """The whole page."""
    report = source.report
    steps = plural(len(report.domains), "domain")
    header = tag(
        "header",
        tag("p", "Retention report", class_="kicker"),
        tag("h1", f"What is kept after {steps}"),
        tag("p", f"Base model {source.base.id} · {source.created[:10]} · lorary {source.version}", class_="faint"),
        tag("p", _verdict(source.verdicts)) if source.verdicts else None,
        tag("button", "Light or dark", type="button", id="theme", hidden=True),
    )
    sections = [
        ("summary", "Summary", "Summary", _summary(source)),
        ("matrix", "Matrix", "Every domain after every step", _matrices(report)),
        ("domains", "Domains", "What became of each domain", _domains(report)),
        ("routing", "Routing", "Where texts go", _routing(report)),
        ("prototypes", "Prototypes", "How the domains lie", _prototypes(source.details)),
        ("layers", "Experts", "Experts and their gates by layer", _layers(source.details)),
        ("versions", "Versions", "Versions and where they come from", _lineage(source)),
        ("data", "Data", "What was measured, on what", _data(source)),
        ("formulas", "Formulas", "Every figure, with its formula", _formulas(report)),
    ]
    links = [tag("a", short, href=f"#{key}") for key, short, _, _ in sections]
    body = [
        tag("section", tag("h2", title), content, id=key, class_=key in HALVES and "half")
        for key, _, title, content in sections
    ]
    return document(
        tag("a", "Skip to the report", href="#summary", class_="skip"),
        header,
        tag("nav", links, aria_label="Sections"),
        tag("main", body),
        tag("div", id="tip", role="status", hidden=True),
        title=f"Retention of {steps} on {source.base.id}",
        style=_beside("report.css"),
        script=_beside("report.js"),
    )


def _summary(source: PageSource) -> Html:
    report = source.report
    figures = {figure.name: figure for figure in report.figures}
    cards = [_card(figures[name]) for name in CARDS if name in figures]
    left_out = [tag("li", tag("b", name), f": {why}") for name, why in report.left_out.items()]
    missing = tag("div", tag("p", "Left out, because they could not be measured:"), tag("ul", left_out), class_="note")
    return join(
        tag("p", _sentence(figures), class_="lead"),
        tag("div", cards, class_="cards"),
        _gates(source.verdicts) if source.verdicts else None,
        missing if left_out else None,
    )


def _sentence(figures: "Mapping[str, Figure]") -> str:
    """The report in words."""
    kept, oracle, general = (figures[name].whole.value for name in ("retention", "oracle_share", "general_delta"))
    words = []
    if kept is not None:
        words.append(f"{show_value(kept, 'share')} of what was learned is still there")
    if oracle is not None:
        words.append(f"routing keeps {show_value(oracle, 'share')} of the gain under the right experts alone")
    if general is not None:
        change = f"{show_value(abs(general), 'share')} {'worse' if general > 0 else 'better'} than by the bare base"
        words.append(f"general text is predicted {change}")
    text = "; ".join(words)
    return text[:1].upper() + text[1:] + "."


def _card(figure: "Figure") -> Html:
    known = {name: value.value for name, value in figure.domains.items() if value.value is not None}
    worst = (max if figure.is_less_better else min)(known, key=known.__getitem__) if len(known) > 1 else None
    interval = show_interval(figure.whole.interval, figure.unit)
    unit = figure.unit if figure.unit in ("bits/byte", "nats") else ""
    return tag(
        "div",
        tag("h3", figure.title),
        tag("p", show_value(figure.whole.value, figure.unit), tag("small", f" {unit}") if unit else None, class_="big"),
        tag("p", "95 %: " + interval, class_="faint") if interval != "-" else None,
        tag("p", f"worst: {worst} {show_value(known[worst], figure.unit)}", class_="faint") if worst else None,
        tag("p", figure.meaning, class_="meaning"),
        class_="card",
    )


def _gates(verdicts: "Sequence[Verdict]") -> Html:
    rows = []
    for verdict in verdicts:
        word = tag("span", "holds" if verdict.holds else "fails", class_="pill good" if verdict.holds else "pill bad")
        cells = [
            tag("td", word),
            number(str(verdict.checked), verdict.checked),
            tag("td", show_failed(verdict) or "-", class_="prose"),
        ]
        rows.append((str(verdict.threshold), cells))
    return join(tag("h3", "Gates"), sortable(("Gate", "Verdict", "Checked", "Failed"), rows, "Gates", numeric=[2]))


def _matrices(report: "RetentionReport") -> Html:
    legend = tag(
        "p",
        tag("span", "best"),
        [tag("i", class_=f"swatch h{level}") for level in range(LEVELS)],
        tag("span", "worst of a column"),
        tag("span", "outlined: when the domain was learned"),
        tag("span", "a column spans at least 5\u00a0% of its bits, or 20 points of accuracy"),
        class_="legend",
    )
    parts = [
        tag("p", "Point at a cell, or go there with the arrow keys, for its interval and the texts behind it."),
        legend,
        tag("h3", "Bits per byte of held-out text, less is better"),
        heat_grid(report.bits, "Bits per byte after each step"),
    ]
    if report.accuracy:
        parts += [tag("h3", "Questions answered right, by likelihood; more is better")]
        parts += [heat_grid(report.accuracy, "Accuracy after each step")]
    return join(parts)


def _domains(report: "RetentionReport") -> Html:
    marks = [tag("i", class_=f"dot {kind}") for kind in ("kept", "oracle")]
    legend = tag("p", marks[0], tag("span", "kept"), marks[1], tag("span", "share of oracle gain"), class_="legend")
    return join(
        tag(
            "p",
            "Bits per byte under the base, when the domain was learned, and now; what of the gain is kept, against "
            "the right experts alone too; what other steps did; texts routed to their own domain. Small figures are "
            "95\u00a0% intervals.",
        ),
        domains_table(report),
        tag("h3", "Kept, and kept by routing"),
        legend,
        scroller(shares_picture(report), "Kept shares"),
    )


def _routing(report: "RetentionReport") -> Html:
    accuracy = report.figure("routing_accuracy").whole
    right = f"{show_value(accuracy.value, 'share')} of the held-out texts go to their own domain"
    interval = f" (95 %: {show_interval(accuracy.interval, 'share')})"
    return join(
        tag("p", f"{right}{interval}. A row for each domain of the texts, a column for each slot that took them."),
        confusion_grid(report),
    )


def _prototypes(details: "ReportDetails") -> Html:
    first, second = (show_value(share, "share") for share in details.explained)
    words = f"Typical texts of each domain, as the router's features see them, in two dimensions: {first} and {second} "
    return join(tag("p", words + "of the variance."), scroller(prototype_map(details), "Prototype map"))


def _layers(details: "ReportDetails") -> Html:
    words = "How many experts each decoder layer has; a bar for each, as high as its mean gate on its own text."
    return join(tag("p", words), layers_grid(details))


def _lineage(source: PageSource) -> Html:
    manifests = source.report.scores.manifests
    measured = {name: manifest.version for name, manifest in zip(source.report.columns, manifests, strict=True)}
    drawn = source.history
    words = "A line leads from a version to the one retrained from it. Filled: the version that was measured."
    if len(drawn) > MAX_LINES:
        drawn = {name: versions for name, versions in drawn.items() if len(versions) > 1}
        words += f" Left out: {plural(len(source.history) - len(drawn), 'domain')} with a single version."
    picture = scroller(lineage_picture(drawn, measured), "Lineage") if drawn else None
    return join(tag("p", words), picture)


def _data(source: PageSource) -> Html:
    report, manifests = source.report, source.report.scores.manifests
    rows = []
    for name, manifest, data, cell in zip(
        report.columns, manifests, report.scores.data, report.scores.alone, strict=True
    ):
        total = sum(cell.text_bytes)
        cells = [
            tag("td", manifest.description, class_="prose"),
            number(str(len(data.texts)), len(data.texts)),
            number(size(total), total),
            number(str(len(data.questions) or "-"), len(data.questions)),
            _digest(manifest.digest),
            _digest(data.digest),
        ]
        rows.append((f"{name}@{manifest.version}", cells))
    columns = ("Version", "Description", "Texts", "Bytes", "Questions", "Pack", "Held-out data")
    references = ",".join(f"{manifest.name}@{manifest.version}" for manifest in manifests[1:])
    return join(
        sortable(columns, rows, "Versions and data", numeric=range(2, 5)),
        tag("p", "The same numbers again, in any copy of this registry:"),
        tag("pre", tag("code", f"registry report --domains {references}")),
        tag("p", "Base weights ", tag("code", source.base.weights), class_="faint"),
    )


def _formulas(report: "RetentionReport") -> Html:
    rows = []
    for figure in report.figures:
        prose = (tag("code", figure.formula), figure.meaning, figure.source)
        cells = [value_cell(figure.whole, figure.unit), tag("td", figure.unit)]
        rows.append((figure.title, [*cells, *(tag("td", text, class_="prose") for text in prose)]))
    columns = ("Figure", "Value", "Unit", "Formula", "Meaning", "Source")
    symbols = [join(tag("dt", tag("code", symbol)), tag("dd", meaning)) for symbol, meaning in SYMBOLS]
    return join(
        tag("dl", symbols),
        sortable(columns, rows, "Formulas", numeric=[1]),
        tag(
            "p",
            "Intervals are 95\u00a0%: Wilson's for accuracies of cells, else the bootstrap over texts, paired: all "
            "steps of a column share their draws. A share is not defined for a domain that gained nothing.",
        ),
    )


def _verdict(verdicts: "Sequence[Verdict]") -> Html:
    failed = sum(not verdict.holds for verdict in verdicts)
    words = f"{failed} of {plural(len(verdicts), 'gate')} failed" if failed else f"{plural(len(verdicts), 'gate')} held"
    return tag("span", words, class_="pill bad" if failed else "pill good")


def _digest(digest: str) -> Html:
    return tag("td", tag("code", brief(digest).removeprefix("sha256:"), title=digest))


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
