"""What a command shows, before it is formatted: output.py draws it on a terminal, as TSV in a pipe, or as JSON.

All text is plain text and never markup. Styles are meanings, not colours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Span:
    """Text in one style."""

    text: str
    style: str = ""  # strong, faint, good, warn, bad, slot0 ... slot6, heat0 (best) ... heat5


Line = tuple[Span, ...]
Part = str | Span | Line


@dataclass(frozen=True)
class Cell:
    """One value: formatted for a terminal, and exact for a pipe."""

    shown: Line
    plain: str


@dataclass(frozen=True)
class Fields:
    """Labels with values, one per line."""

    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Table:
    """Column headings with rows below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: frozenset[int] = frozenset()  # columns that are aligned right
    no_wrap: frozenset[int] = frozenset()  # columns that are never broken into lines


@dataclass(frozen=True)
class Paragraph:
    """One or more lines of text."""

    line: Line
    in_pipes: bool = True


@dataclass(frozen=True)
class SlotRuns:
    """Text in runs of tokens with the same slot: coloured, or in brackets with the slot's number without colours."""

    runs: tuple[tuple[str, int], ...]


Block = Fields | Table | Paragraph | SlotRuns


@dataclass(frozen=True)
class Page:
    """Everything that a command shows."""

    data: dict[str, Any]  # for --json
    blocks: tuple[Block, ...] = ()
    hints: tuple[str, ...] = field(default=())  # what to do next; not for pipes or --json


def line(*parts: Part) -> Line:
    """Join texts, spans and lines.

    >>> line("a ", Span("b", "good"))
    (Span(text='a ', style=''), Span(text='b', style='good'))
    """
    spans: list[Span] = []
    for part in parts:
        if isinstance(part, tuple):
            spans += part
        else:
            spans.append(Span(part) if isinstance(part, str) else part)
    return tuple(spans)


def cell(shown: Part, plain: object = None) -> Cell:
    """Make a cell; pipes get the same text unless `plain` is given."""
    whole = line(shown)
    return Cell(whole, "".join(span.text for span in whole) if plain is None else str(plain))


def fields(rows: Iterable[tuple[str, Cell | Part | None] | None]) -> Fields:
    """Make fields; rows that are None, or whose value is None, are left out."""
    kept = [(row[0], row[1]) for row in rows if row is not None and row[1] is not None]
    return Fields(tuple((label, value if isinstance(value, Cell) else cell(value)) for label, value in kept))


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[Cell | Part]],
    *,
    right: Iterable[str] = (),
    no_wrap: Iterable[str] = (),
) -> Table:
    """Make a table; `right` and `no_wrap` name columns."""
    headings = tuple(columns)
    cells = tuple(tuple(value if isinstance(value, Cell) else cell(value) for value in row) for row in rows)
    return Table(
        headings,
        cells,
        frozenset(headings.index(name) for name in right),
        frozenset(headings.index(name) for name in no_wrap),
    )


def slot_style(slot: int) -> str:
    """Return the style of a slot: slot0 for KP; the six styles of domains repeat."""
    return f"slot{slot if slot == 0 else (slot - 1) % 6 + 1}"


def title(name: str, *more: Part) -> Paragraph:
    """Make a heading; pipes leave it out."""
    return Paragraph(line(Span(name, "strong"), *more), in_pipes=False)


def faint(text: str) -> Span:
    """Make a span of less important text."""
    return Span(text, "faint")
