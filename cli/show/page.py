"""Page: what a command shows, before it is decided how. output.py draws it for people, for pipes or as JSON.

Text here is only text: nothing in it is markup, whoever wrote it. Styles are meanings, not colours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Span:
    """A piece of text with one meaning."""

    text: str
    style: str = ""  # strong, faint, good, warn, bad, slot0 ... slot6, heat0 (best) ... heat5


Line = tuple[Span, ...]
Part = str | Span | Line


@dataclass(frozen=True)
class Cell:
    """One value: as a person reads it, and exact for a pipe."""

    shown: Line
    plain: str


@dataclass(frozen=True)
class Facts:
    """Labels with values, one a line."""

    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Table:
    """Headings with rows below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: frozenset[int] = frozenset()  # columns of numbers
    tight: frozenset[int] = frozenset()  # columns that are never broken into lines


@dataclass(frozen=True)
class Words:
    """A line of text, or several."""

    line: Line
    in_pipes: bool = True


@dataclass(frozen=True)
class Runs:
    """A text in runs that belong to slots: coloured, or in brackets with the slot's number where there is no colour."""

    runs: tuple[tuple[str, int], ...]


Block = Facts | Table | Words | Runs


@dataclass(frozen=True)
class Page:
    """Everything a command shows."""

    data: dict[str, Any]  # for --json
    blocks: tuple[Block, ...] = ()
    hints: tuple[str, ...] = field(default=())  # what to do next; for people only


def line(*parts: Part) -> Line:
    """Text, spans and lines as one line.

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
    """A value; in a pipe the same text unless `plain` says otherwise."""
    whole = line(shown)
    return Cell(whole, "".join(span.text for span in whole) if plain is None else str(plain))


def facts(rows: Iterable[tuple[str, Cell | Part | None] | None]) -> Facts:
    """Labels with values; a row that is None, or has None for its value, is left out."""
    kept = [(row[0], row[1]) for row in rows if row is not None and row[1] is not None]
    return Facts(tuple((label, value if isinstance(value, Cell) else cell(value)) for label, value in kept))


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[Cell | Part]],
    *,
    right: Iterable[str] = (),
    tight: Iterable[str] = (),
) -> Table:
    """A table; `right` and `tight` name columns."""
    headings = tuple(columns)
    cells = tuple(tuple(value if isinstance(value, Cell) else cell(value) for value in row) for row in rows)
    return Table(
        headings,
        cells,
        frozenset(headings.index(name) for name in right),
        frozenset(headings.index(name) for name in tight),
    )


def slot_style(slot: int) -> str:
    """The style of a slot by its number; 0 is KP, the six of the domains repeat."""
    return f"slot{slot if slot == 0 else (slot - 1) % 6 + 1}"


def title(name: str, *more: Part) -> Words:
    """The first line of a page, for people only."""
    return Words(line(Span(name, "strong"), *more), in_pipes=False)


def faint(text: str) -> Span:
    """Less important text."""
    return Span(text, "faint")
