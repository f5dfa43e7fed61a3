"""The retention report as one HTML page that loads nothing, so that it can be mailed and opened from a disk."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .formatting import failing_kinds, format_value, not_measurable
from .grids import HEAT_LEVELS, confusion_grid, heat_grid, layers_grid
from .pictures import lineage_picture, prototype_map, shares_picture
from .templates import read_asset, render

if TYPE_CHECKING:
    from ...registry.maintenance.log import LogEntry
    from ...registry.measure.report import Figure, Interval, RetentionReport
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
MAX_LINES: Final = 24  # domains whose lineage is drawn; with more, only those that were retrained
SYMBOLS: Final = (
    (
        "R[i, j]",
        "score on domain j after step i: bits per byte of held-out text (lower is better), or accuracy (higher is "
        "better)",
    ),
    (
        "i, T",
        "a step, and the last one; step 0 is the bare base model, step 1 adds the knowledge-preservation (KP) bank, "
        "the shared general expert, and each later step adds a domain",
    ),
    ("L(j)", "the step at which domain j was learned; outlined in the heat map"),
    ("G[i, j]", "gain over the base: R[0, j] - R[i, j] for bits per byte, R[i, j] - R[0, j] for accuracy"),
)


@dataclass(frozen=True, kw_only=True)
class PageSource:
    """Everything that the page shows."""

    report: "RetentionReport"
    verdicts: "Sequence[Verdict]"
    details: "ReportDetails"
    history: "Mapping[str, Sequence[LogEntry]]"  # by domain, oldest version first
    base: "BaseRecord"
    created: str  # time, ISO 8601
    version: str  # of this program


@dataclass(frozen=True, kw_only=True)
class Card:
    """A figure of the summary, with the domain that does worst where there are several."""

    figure: "Figure"
    worst: str | None


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """Scores of one domain: of the base model, when it was learned, and after the last step."""

    name: str
    base: float | None
    learned: float | None
    now: float | None
    interval: "Interval | None"
    accuracy_before: float | None
    accuracy_now: float | None
    accuracy_interval: "Interval | None"
    verdict: str  # of bits per byte
    accuracy_verdict: str | None


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """What one version was measured on."""

    reference: str
    description: str
    texts: int
    bytes: int
    questions: int
    pack: str  # digest
    data: str  # digest


def retention_html(source: PageSource) -> str:
    """Render the whole page."""
    report = source.report
    style, script = read_asset("report.css"), read_asset("report.js")
    figures = {figure.name: figure for figure in report.figures}
    drawn = _drawn_history(source.history)
    measured = {manifest.name: manifest.version for manifest in report.scores.manifests}
    return render(
        "report.html.jinja",
        source=source,
        report=report,
        figures=figures,
        style=style,
        script=script,
        policy=content_policy(style=style, script=script),
        summary=_summary(figures),
        cards=[_card(figures[name]) for name in CARDS if name in figures],
        heat_levels=HEAT_LEVELS,
        bits_grid=heat_grid(report, report.bits, "Bits per byte after each step"),
        accuracy_grid=heat_grid(report, report.accuracy, "Accuracy after each step") if report.accuracy else None,
        domain_rows=list(_domain_rows(report)),
        shares=shares_picture(report),
        confusion=confusion_grid(report),
        map=prototype_map(source.details),
        layers=layers_grid(source.details),
        lineage=lineage_picture(drawn, measured) if drawn else None,
        lineage_left_out=len(source.history) - len(drawn),
        data_rows=list(_data_rows(report)),
        symbols=SYMBOLS,
        not_measurable=not_measurable(report),
        kinds=failing_kinds(report, source.verdicts),
    )


def content_policy(*, style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows this style and this script, and nothing else.

    Raises:
        ValueError: Style or script would end its element early.
    """
    if "</" in style or "</script" in script.lower() or "<!--" in script:
        raise ValueError("style and script cannot hold the end of their element")
    return (
        f"default-src 'none'; style-src '{_csp_digest(style)}'; script-src '{_csp_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _csp_digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _summary(figures: "Mapping[str, Figure]") -> str:
    """Write the report as one sentence."""
    kept, oracle, general = (figures[name].whole.value for name in ("retention", "oracle_share", "general_delta"))
    parts = []
    if kept is None:
        parts.append("how much of the gain is retained is not measurable")
    else:
        parts.append(f"{format_value(kept, 'share')} of the gain is retained")
    if oracle is not None:
        parts.append(f"routing reaches {format_value(oracle, 'share')} of the gain of each domain's own experts alone")
    if general is not None:
        change = f"{format_value(abs(general), 'share')} {'worse' if general > 0 else 'better'}"
        parts.append(f"general text is predicted {change} than by the bare base model")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _card(figure: "Figure") -> Card:
    known = {name: value.value for name, value in figure.domains.items() if value.value is not None}
    worst = (max if figure.is_less_better else min)(known, key=known.__getitem__) if len(known) > 1 else None
    return Card(figure=figure, worst=worst)


def _domain_rows(report: "RetentionReport") -> Iterator[DomainRow]:
    last, scores = len(report.steps) - 1, report.accuracy
    verdicts = {(change.domain, change.metric): change.verdict for change in report.changes}
    for j, name in enumerate(report.columns):
        k = scores.matrix.domains.index(name) if scores and name in scores.matrix.domains else None
        yield DomainRow(
            name=name,
            base=report.bits.value(0, j),
            learned=report.bits.value(j + 1, j),
            now=report.bits.value(last, j),
            interval=report.bits.intervals[last][j],
            accuracy_before=scores.value(0, k) if scores and k is not None else None,
            accuracy_now=scores.value(last, k) if scores and k is not None else None,
            accuracy_interval=scores.intervals[last][k] if scores and k is not None else None,
            verdict=verdicts[name, "bits per byte"],
            accuracy_verdict=verdicts.get((name, "accuracy")),
        )


def _data_rows(report: "RetentionReport") -> Iterator[DataRow]:
    scores = report.scores
    for manifest, data, cell in zip(scores.manifests, scores.data, scores.alone, strict=True):
        yield DataRow(
            reference=f"{manifest.name}@{manifest.version}",
            description=manifest.description,
            texts=len(data.texts),
            bytes=sum(cell.text_bytes),
            questions=len(data.questions),
            pack=manifest.digest,
            data=data.digest,
        )


def _drawn_history(history: "Mapping[str, Sequence[LogEntry]]") -> "Mapping[str, Sequence[LogEntry]]":
    """Return the domains whose lineage is drawn: all, or of many those that were retrained."""
    if len(history) <= MAX_LINES:
        return history
    return {name: versions for name, versions in history.items() if len(versions) > 1}
