"""`registry report`: retention of every domain after every step, with intervals, formulas and thresholds."""

import csv
import io
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...domains.errors import InputError
from ..options import Device, Dtype, Json, NoQuestions, StorePath
from ..report.formatting import not_measurable
from ..report.html import PageSource, retention_html
from ..report.markdown import retention_markdown
from ..report.svg import retention_svg
from ..report.terminal import (
    MAX_COLUMNS,
    confusion_table,
    domains_table,
    figures_table,
    heat_table,
    kind_blocks,
    questions_table,
    verdict_lines,
    verdicts_table,
)
from ..show import output
from ..show.numbers import exact
from ..show.page import Block, Page, Paragraph, Span, faint, line, title
from ..show.progress import show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.measure.report import RetentionReport
    from ...registry.measure.thresholds import Verdict

SYMBOLS = "R: score; G: gain over the base; i: step; j: domain; T: last step; L(j): step at which j was learned"


def report(
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help='A threshold such as "retention>=0.98": exit with 9 if a domain misses it. Repeatable.',
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a self-contained HTML page.", show_default=False),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the heat maps and kept shares as an SVG image.", show_default=False),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every score with its interval.", show_default=False)
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Only these domains, as if added in this order: medicine,legal@2.", show_default="all"
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum bytes of held-out text per domain.", show_default="120000"),
    ] = None,
    no_questions: NoQuestions = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    form: Annotated[
        Literal["table", "github"],
        typer.Option(
            "--format", metavar="table|github", help="github prints Markdown, for a comment on a pull request."
        ),
    ] = "table",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Report the retention of every domain after every step: scores, forgetting, transfer, routing and drift.

    Scores are cached in the registry: after one more domain only its row is measured, and a repeated command resumes an
    interrupted one.

    Example: registry report --gate "retention>=0.98"
    """
    from ...registry.measure.thresholds import check_verdicts, judge, parse_threshold

    if form == "github" and as_json:
        raise InputError("--format github and --json exclude each other.", fix="leave one of them out")
    thresholds = [parse_threshold(text) for text in gate or []]
    for path in filter(None, (html, svg, csv)):
        _check_writable(path)  # measuring may take long
    registry = open_registry(store, device=device, dtype=dtype)
    named = [name.strip() for name in (domains or "").split(",") if name.strip()]
    with show_progress("reading held-out text", as_json=as_json) as progress:
        found = registry.retention(
            named, questions=not no_questions, max_bytes=max_bytes, on_progress=progress.on_progress
        )
    verdicts = judge(found, thresholds)
    if csv:
        _write(csv, cells_csv(found).encode())
    if html:
        _write(html, retention_html(_page_source(registry, found, verdicts)).encode())
    if svg:
        _write(svg, retention_svg(found).encode())
    if form == "github":
        output.show_document(retention_markdown(found, verdicts))
    else:
        output.show(retention_page(found, verdicts), command="report", as_json=as_json)
    check_verdicts(verdicts)


def _page_source(registry: "Registry", report: "RetentionReport", verdicts: "list[Verdict]") -> PageSource:
    """Collect what the HTML page shows."""
    from importlib.metadata import version

    from ...registry.measure.report_details import read_details

    manifests = dict(zip(report.columns, report.scores.manifests, strict=True))
    return PageSource(
        report=report,
        verdicts=verdicts,
        details=read_details(registry.store, manifests),
        history={name: sorted(registry.log(name), key=lambda entry: entry.version) for name in manifests},
        base=registry.base_record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("lorary"),
    )


def retention_page(report: "RetentionReport", verdicts: "list[Verdict]") -> Page:
    """Make the page for the terminal."""
    blocks: list[Block] = [
        title("Verdict", *(_headline(report))),
        verdicts_table(report),
        title("Retention", faint("   bits per byte after each step, lower is better")),
        heat_table(report.bits),
    ]
    if len(report.columns) > MAX_COLUMNS:
        blocks.append(Paragraph(line(faint("0 is the best score of a column, 5 the worst")), in_pipes=False))
    if report.accuracy:
        blocks += [
            title("Accuracy on questions", faint("   by likelihood, higher is better")),
            heat_table(report.accuracy),
        ]
    blocks += [title("Domains"), domains_table(report)]
    blocks += [questions_table(report, report.accuracy)] if report.accuracy else []
    blocks += [title("Routing", faint("   held-out texts by the slot with the largest gate"))]
    blocks += [confusion_table(report), title("Figures", faint("   " + SYMBOLS)), figures_table(report.figures)]
    blocks += [*kind_blocks(report, verdicts), *verdict_lines(verdicts)]
    hints = [f"Left out: {name}: {why}" for name, why in report.left_out.items()]
    hints += [f"Not measurable: {what} of {name}: {why}" for (what, name), why in not_measurable(report).items()]
    data = report.as_json() | {"gates": [verdict.as_json() for verdict in verdicts]}
    return Page(data=data, blocks=tuple(blocks), hints=tuple(hints))


def _headline(report: "RetentionReport") -> tuple[Span, Span]:
    """Say first whether something got worse."""
    names = ", ".join(dict.fromkeys(change.domain for change in report.worse))
    return Span("   "), Span(f"worse: {names}", "bad") if names else Span("nothing got worse", "good")


def cells_csv(report: "RetentionReport") -> str:
    """Write every measured score as a CSV row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "after", "domain", "metric", "value", "low", "high", "n"])
    for metric, scores in (("bits_per_byte", report.bits), ("accuracy", report.accuracy)):
        if scores is None:
            continue
        for i, step in enumerate(scores.matrix.steps):
            for j, name in enumerate(scores.matrix.domains):
                value, interval = scores.value(i, j), scores.intervals[i][j]
                if value is not None and interval is not None:
                    numbers = map(exact, (value, *interval))
                    writer.writerow([i, step, name, metric, *numbers, scores.counts[name]])
    return text.getvalue()


def _check_writable(path: Path) -> None:
    """Raise if no file can be written to this path.

    Raises:
        InputError: Its folder does not exist or is not writable, or the path is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{path} is a folder.", fix=f"name a file: {path / 'report.html'}")
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.", fix=f"mkdir -p {shlex.quote(str(folder))}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is not writable.", fix="name a file in another folder")


def _write(path: Path, data: bytes) -> None:
    """Write a file that the user asked for."""
    from ...registry.store.files import write_atomic

    write_atomic(path.absolute(), data)
