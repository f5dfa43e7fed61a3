"""The one module that prints and that uses rich, which it imports only when something is drawn.

stdout holds the result: a table on a terminal, tab-separated values in a pipe, one JSON document with --json.
stderr holds everything else: progress, hints and errors; with --json each of its lines is a JSON document too.

$NO_COLOR turns colours off; $FORCE_COLOR formats the output as on a terminal.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from ...domains.errors import InputError
from .charts import HEAT_COLOURS
from .page import Block, Cell, Fields, Line, Page, Paragraph, SlotRuns, slot_style
from .safe_text import clean, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
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
    """Write the result of a command to stdout and its hints to stderr."""
    with _open_pipe():
        if as_json:
            print(_json({"schema": SCHEMA, "command": command, **page.data}, indent=2))
        elif is_terminal(sys.stdout):
            _draw(page.blocks)
        else:
            print("\n\n".join(filter(None, map(_tsv, page.blocks))))
        sys.stdout.flush()
    if page.hints and not as_json:
        hint("\n".join(("", *page.hints) if sys.stdout.isatty() else page.hints))


@contextmanager
def _open_pipe() -> Iterator[None]:
    """Go on where the reader of stdout, such as head, has enough: the command ends with its own exit code."""
    try:
        yield
    except BrokenPipeError:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def show_blocks(*blocks: Block) -> None:
    """Write a part of a result to stdout, as `show` does."""
    if is_terminal(sys.stdout):
        _draw(blocks)
    else:
        print("\n\n".join(filter(None, map(_tsv, blocks))))
    sys.stdout.flush()


def write_piece(text: str) -> None:
    """Write a piece of running text to stdout."""
    print(clean(text) if is_terminal(sys.stdout) else text, end="", flush=True)


def read_lines(prompt: str) -> Iterator[str]:
    """Yield what is typed on the terminal, with line editing and history; or the lines of a pipe, without a prompt.

    A line that is interrupted by Ctrl-C is dropped; Ctrl-D ends the input.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # `input` uses it
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def show_document(text: str) -> None:
    """Write a document to stdout: byte for byte in a pipe, without control characters on a terminal."""
    with _open_pipe():
        print(clean(text) if is_terminal(sys.stdout) else text)
        sys.stdout.flush()


def hint(text: str) -> None:
    """Write a hint to stderr: what to do next, or what is about to happen."""
    _console(sys.stderr).print(_text(text, "faint")) if is_terminal(sys.stderr) else write_line(text)


def show_error(record: dict[str, Any], *, as_json: bool) -> None:
    """Write an error to stderr: three lines, or a JSON document; `record` has code, exit, message, cause and fix."""
    if as_json:
        write_json_line({"error": record})
        return
    for label, key, style in (("Error", "message", "bad"), ("Cause", "cause", "faint"), ("Fix", "fix", "good")):
        text = str(record[key] or "").strip()
        if text and is_terminal(sys.stderr):
            _console(sys.stderr).print(_text(f"{label}: ", style), _text(text), sep="", soft_wrap=True)
        elif text:
            write_line(f"{label}: {text}")


def is_terminal(stream: TextIO) -> bool:
    """Return whether output to this stream is formatted for a terminal."""
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR"))


def confirm(question: str, *, instead: str) -> bool:
    """Ask a yes-or-no question on the terminal; return whether the answer is yes.

    Raises:
        InputError: stdin is no terminal; the fix is `instead`, the command that does not ask.
    """
    if not sys.stdin.isatty():
        raise InputError("This command asks for confirmation, and standard input is not a terminal.", fix=instead)
    print(clean(question), "[y/N] ", file=sys.stderr, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class ProgressBar:
    """A progress bar on stderr; made by `progress_bar`."""

    def __init__(self, progress: "Progress", stage: str):
        self._progress = progress
        self._task = progress.add_task(one_line(stage), total=None, figures="")

    def start(self, stage: str) -> None:
        """Start a stage of unknown length."""
        self._progress.reset(self._task, description=one_line(stage), total=None, figures="")

    def update(self, stage: str, done: int, total: int, figures: str) -> None:
        """Update the progress bar."""
        self._progress.update(self._task, description=one_line(stage), completed=done, total=total, figures=figures)

    def log(self, text: str) -> None:
        """Write a line above the bar."""
        self._progress.console.print(_text(text))


@contextmanager
def progress_bar(stage: str) -> "Iterator[ProgressBar]":
    """Show a progress bar that is erased at the end."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(style="cyan"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=14, complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.fields[figures]}", markup=False, style=_STYLES["faint"]),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as progress:
        yield ProgressBar(progress, stage)


def write_line(text: str) -> None:
    """Write a plain line to stderr."""
    print(clean(text), file=sys.stderr, flush=True)


def write_json_line(value: object) -> None:
    """Write a JSON document to stderr, on one line."""
    print(_json(value), file=sys.stderr, flush=True)


def _json(value: object, *, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False)


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    is_forced = is_terminal(stream) or None
    return Console(file=stream, force_terminal=is_forced, highlight=False, markup=False, emoji=False)


def _draw(blocks: tuple[Block, ...]) -> None:
    console = _console(sys.stdout)
    for i, block in enumerate(blocks):
        if i:
            console.print()
        console.print(_renderable(block, has_colour=console.color_system is not None and not console.no_color))


def _renderable(block: Block, *, has_colour: bool) -> "RenderableType":
    from rich.table import Table as Grid

    if isinstance(block, Paragraph):
        return _line(block.line)
    if isinstance(block, SlotRuns):
        return _in_colours(block) if has_colour else _text(_in_brackets(block))
    if isinstance(block, Fields):
        grid = Grid.grid(padding=(0, 3, 0, 0))
        grid.add_column(style=_STYLES["faint"], no_wrap=True)
        for label, value in block.rows:
            grid.add_row(_text(label), _line(value.shown))
        return grid
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=_STYLES["faint"])
    for i, name in enumerate(block.columns):
        grid.add_column(_text(name), justify="right" if i in block.right else "left", no_wrap=i in block.no_wrap)
    for row in block.rows:
        grid.add_row(*(_line(value.shown) for value in row))
    return grid


def _line(spans: Line) -> "Text":
    from rich.text import Text

    return Text.assemble(*((clean(span.text), _STYLES.get(span.style, "")) for span in spans))


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(clean(text), style=_STYLES.get(style, ""), end="")


def _in_colours(block: SlotRuns) -> "Text":
    from rich.text import Text

    return Text.assemble(*((clean(text), _STYLES[slot_style(slot)]) for text, slot in block.runs))


def _tsv(block: Block) -> str:
    """Format a block for a pipe: tab-separated values, nothing truncated."""
    if isinstance(block, Paragraph):
        return clean("".join(span.text for span in block.line)) if block.in_pipes else ""
    if isinstance(block, SlotRuns):
        return clean(_in_brackets(block))
    if isinstance(block, Fields):
        return "\n".join(f"{one_line(label)}\t{_value(value)}" for label, value in block.rows)
    return "\n".join(["\t".join(block.columns), *("\t".join(map(_value, row)) for row in block.rows)])


def _value(value: Cell) -> str:
    return one_line(value.plain)


def _in_brackets(block: SlotRuns) -> str:
    return "".join(f"[{slot}:{text}]" for text, slot in block.runs)
