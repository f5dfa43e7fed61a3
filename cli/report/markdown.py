"""The verdicts of a retention report as Markdown, for a comment on a pull request."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..show.numbers import plural
from ..show.safe_text import one_line
from .formatting import failing_kinds, format_count, format_failed, format_interval, format_value

if TYPE_CHECKING:
    from ...registry.measure.changes import Change
    from ...registry.measure.report import RetentionReport
    from ...registry.measure.thresholds import Verdict

_MARKS: Final = {"worse": ":red_circle:", "unclear": ":yellow_circle:", "kept": ":green_circle:"}
_SPECIAL: Final = "\\`*_{}[]()<>#|~@&"


def retention_markdown(report: "RetentionReport", verdicts: Sequence["Verdict"]) -> str:
    """Write thresholds, what became of each domain, and the kinds of text that got worse; names stay plain text."""
    worse = ", ".join(dict.fromkeys(_plain(change.domain) for change in report.worse))
    head = f":red_circle: worse: {worse}" if worse else ":green_circle: nothing got worse"
    lines = [f"### Retention after {plural(len(report.domains), 'domain')}: {head}", ""]
    if verdicts:
        rows = [
            (f"`{verdict.threshold}`", _verdict(verdict), _plain(format_failed(verdict)) or "-") for verdict in verdicts
        ]
        lines += [*_table(("threshold", "verdict", "failed"), rows), ""]
    lines += _changes("domain", report.changes)
    kinds = failing_kinds(report, verdicts)
    if kinds:
        lines += ["", "**Kinds of text that an average hides**", "", *_changes("kind", kinds)]
    for change in kinds:
        found = report.portrait(change.domain)
        words = ", ".join(map(_plain, found.words)) or "-"
        lines += ["", f"<details><summary>{_plain(change.domain)}: {words}</summary>", ""]
        lines += [*(f"- {_plain(row)}" for row in found.examples), "", "</details>"]
    for name, why in report.left_out.items():
        lines += ["", f"Left out: {_plain(name)}: {_plain(why)}"]
    return "\n".join(lines)


def _verdict(verdict: "Verdict") -> str:
    return ":green_circle: holds" if verdict.holds else ":red_circle: fails"


def _changes(what: str, changes: Sequence["Change"]) -> list[str]:
    rows = []
    for change in changes:
        unit = "bits/byte" if change.metric == "bits per byte" else "share"
        rows.append(
            (
                _plain(change.domain),
                f"{_MARKS[change.verdict]} {_plain(change.words)}",
                format_value(change.before, unit),
                format_value(change.now, unit),
                format_interval(change.interval, "share"),
                format_count(change.samples),
            )
        )
    return _table((what, "verdict", "before", "now", "95 % of change", "n"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _plain(text: str) -> str:
    """Keep text from being markup, a mention, or the end of a cell."""
    return "".join(f"&#{ord(letter)};" if letter in _SPECIAL else letter for letter in one_line(text))
