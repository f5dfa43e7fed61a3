"""The one module that prints, and the only one that knows rich, which it imports when something is drawn.

stdout is the result: a table on a terminal, tab-separated values in a pipe, one JSON document with --json.
stderr is everything else: progress, hints, errors; with --json each of its lines is a JSON document too.

$NO_COLOR takes colours away, $FORCE_COLOR draws for people although stdout is no terminal.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ...domains.errors import InputError
from .charts import HEAT_COLOURS
from .page import Block, Cell, Facts, Line, Page, Runs, Words, slot_style
from .safe_text import clean, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Drawing
    from rich.text import Text

SCHEMA = "lorary.cli/1"

_STYLES = {
    "strong": "bold",
    "faint": "bright_black",
    "good": "green",
    "warn": "yellow",
    "bad": "red",
    "slot0": "bright_black",
    "slot1": "cyan",
    "slot2": "magenta",
    "slot3": "yellow",
    "slot4": "green",
    "slot5": "blue",
    "slot6": "red",
    **{f"heat{level}": f"{ink} on {paper}" for level, (ink, paper) in enumerate(HEAT_COLOURS)},
}


def show(page: Page, *, command: str, as_json: bool) -> None:
    """Shows the result of a command on stdout, and its hints on stderr."""
    if as_json:
        print(_json({"schema": SCHEMA, "command": command, **page.data}, indent=2))
    elif is_for_people(sys.stdout):
        _draw(page.blocks)
    else:
        print("\n\n".join(filter(None, map(_plain, page.blocks))))
    sys.stdout.flush()
    if page.hints and not as_json:
        hint("\n".join(("", *page.hints) if sys.stdout.isatty() else page.hints))


def raw(text: str) -> None:
    """Writes a document that another program made to stdout: as it is in a pipe, made safe on a terminal."""
    print(clean(text) if is_for_people(sys.stdout) else text)
    sys.stdout.flush()


def hint(text: str) -> None:
    """A line on stderr, or several: what can be done next, or what is about to happen."""
    _console(sys.stderr).print(_text(text, "faint")) if is_for_people(sys.stderr) else tell(text)


def failure(record: dict[str, Any], *, as_json: bool) -> None:
    """An error on stderr: three lines, or a JSON document; `record` has code, exit, message, cause and fix."""
    if as_json:
        tell_json({"error": record})
        return
    for label, key, style in (("Error", "message", "bad"), ("Cause", "cause", "faint"), ("Fix", "fix", "good")):
        text = str(record[key] or "").strip()
        if text and is_for_people(sys.stderr):
            _console(sys.stderr).print(_text(f"{label}: ", style), _text(text), sep="", soft_wrap=True)
        elif text:
            tell(f"{label}: {text}")


def is_for_people(stream: TextIO) -> bool:
    """Whether a person reads the stream as it is written."""
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR"))


def confirmed(question: str, *, instead: str) -> bool:
    """Whether a person at the terminal says yes.

    Raises:
        InputError: There is no terminal; names the command that does not ask.
    """
    if not sys.stdin.isatty():
        raise InputError("This asks before it is done, and nobody can answer here.", fix=instead)
    print(clean(question), "[y/N] ", file=sys.stderr, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Bar:
    """A progress bar on stderr; made by `bar`."""

    def __init__(self, drawing: "Drawing", text: str):
        self._drawing = drawing
        self._task = drawing.add_task(one_line(text), total=None, figures="")

    def restart(self, text: str) -> None:
        """Something begins of which nobody knows how long it takes."""
        self._drawing.reset(self._task, description=one_line(text), total=None, figures="")

    def move(self, text: str, done: int, total: int, figures: str) -> None:
        """So far has it come."""
        self._drawing.update(self._task, description=one_line(text), completed=done, total=total, figures=figures)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._drawing.console.print(_text(text))


@contextmanager
def bar(waiting: str) -> "Iterator[Bar]":
    """A bar that goes away at the end."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(style="cyan"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=14, complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.fields[figures]}", markup=False, style=_STYLES["faint"]),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as drawing:
        yield Bar(drawing, waiting)


def tell(text: str) -> None:
    """A plain line on stderr."""
    print(clean(text), file=sys.stderr, flush=True)


def tell_json(value: object) -> None:
    """A JSON document on one line of stderr."""
    print(_json(value), file=sys.stderr, flush=True)


def _json(value: object, *, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False)


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    is_forced = is_for_people(stream) or None
    return Console(file=stream, force_terminal=is_forced, highlight=False, markup=False, emoji=False)


def _draw(blocks: tuple[Block, ...]) -> None:
    console = _console(sys.stdout)
    for i, block in enumerate(blocks):
        if i:
            console.print()
        console.print(_drawn(block, has_colour=console.color_system is not None and not console.no_color))


def _drawn(block: Block, *, has_colour: bool) -> "RenderableType":
    from rich.table import Table as Grid

    if isinstance(block, Words):
        return _line(block.line)
    if isinstance(block, Runs):
        return _coloured(block) if has_colour else _text(_bracketed(block))
    if isinstance(block, Facts):
        grid = Grid.grid(padding=(0, 3, 0, 0))
        grid.add_column(style=_STYLES["faint"], no_wrap=True)
        for label, value in block.rows:
            grid.add_row(_text(label), _line(value.shown))
        return grid
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=_STYLES["faint"])
    for i, name in enumerate(block.columns):
        grid.add_column(_text(name), justify="right" if i in block.right else "left", no_wrap=i in block.tight)
    for row in block.rows:
        grid.add_row(*(_line(value.shown) for value in row))
    return grid


def _line(spans: Line) -> "Text":
    from rich.text import Text

    return Text.assemble(*((clean(span.text), _STYLES.get(span.style, "")) for span in spans))


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(clean(text), style=_STYLES.get(style, ""), end="")


def _coloured(block: Runs) -> "Text":
    from rich.text import Text

    return Text.assemble(*((clean(text), _STYLES[slot_style(slot)]) for text, slot in block.runs))


def _plain(block: Block) -> str:
    """A block for a pipe: tab-separated values, nothing cut off."""
    if isinstance(block, Words):
        return clean("".join(span.text for span in block.line)) if block.in_pipes else ""
    if isinstance(block, Runs):
        return clean(_bracketed(block))
    if isinstance(block, Facts):
        return "\n".join(f"{one_line(label)}\t{_value(value)}" for label, value in block.rows)
    return "\n".join(["\t".join(block.columns), *("\t".join(map(_value, row)) for row in block.rows)])


def _value(value: Cell) -> str:
    return one_line(value.plain)


def _bracketed(block: Runs) -> str:
    return "".join(f"[{slot}:{text}]" for text, slot in block.runs)
