"""`registry log`: every version, and where it comes from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import IntegrityError, LoraryError
from ..options import Json, StorePath
from ..show import facts, output
from ..show.page import Cell, Page, Span, cell, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.maintenance.log import LogEntry


def log(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A domain.", show_default="all domains")] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """List every version, newest first: its parent, how it was retrained, and whether it was held back or removed.

    A version that scores worse than its parent on the parent's held-out text is held back: latest does not move to it.

    Example: registry log medicine
    """
    registry = open_registry(store)
    unreadable: dict[str, LoraryError] = {}
    entries = registry.log(name, on_unreadable=unreadable.__setitem__)
    output.show(log_page(entries), command="log", as_json=as_json)
    refuse_unreadable(unreadable)


def refuse_unreadable(unreadable: "Mapping[str, LoraryError]") -> None:
    """Raise an error that names what an answer leaves out because it cannot be read.

    Raises:
        IntegrityError: There is something.
    """
    if unreadable:
        name, first = next(iter(unreadable.items()))
        raise IntegrityError(
            f"Not shown, because it cannot be read: {', '.join(unreadable)}.",
            cause=f"{name}: {first.message} {first.cause or ''}".strip(),
            fix="See what can be restored: registry verify",
        )


def log_page(entries: "Sequence[LogEntry]") -> Page:
    """Make the list of versions, in the given order."""
    columns = ("VERSION", "ALIASES", "FROM", "MODE", "STATE", "BITS/BYTE", "CREATED")
    rows = table(columns, [_row(entry) for entry in entries], right=("BITS/BYTE",), no_wrap=columns)
    return Page(data={"versions": [asdict(entry) for entry in entries]}, blocks=(rows,))


def _row(entry: "LogEntry") -> Iterable[Cell]:
    parent = f"{entry.name}@{entry.parent}" if entry.parent else ""
    state = Span("removed", "faint") if entry.removed else Span("held back", "warn") if entry.held_back else None
    return [
        cell(f"{entry.name}@{entry.version}"),
        cell(", ".join(entry.aliases)),
        cell(parent or "-", parent),
        cell(entry.mode or "-", entry.mode or ""),
        cell(state) if state else cell("-", ""),
        facts.number(entry.bits_per_byte),
        facts.day(entry.created),
    ]
