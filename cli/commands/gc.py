"""`registry gc`: delete what no version needs."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...domains.errors import InputError
from ..options import Json, StorePath
from ..show import output
from ..show.numbers import size
from ..show.page import Page, cell, fields
from ..show.progress import show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.store.gc import Collected

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only report what would be deleted.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Keep what was changed within this time: 30m, 24h, 7d.")
    ] = "24h",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Delete what no version needs: files of removed versions, and leftovers of crashes and refused pulls.

    A version that was removed longer ago than --older-than cannot be restored afterwards. Files that a version needs
    and files that another process may be writing are kept.

    Example: registry gc --dry-run
    """
    older_than_s = parse_time(older_than)
    registry = open_registry(store)
    with show_progress("looking for unreferenced files", as_json=as_json):
        found = registry.gc(older_than_s=older_than_s, dry_run=dry_run)
    output.show(gc_page(found), command="gc", as_json=as_json)


def gc_page(found: "Collected") -> Page:
    """Make the page about what was deleted."""
    rows = [
        ("would delete" if found.is_dry else "deleted", cell(size(found.bytes), found.bytes)),
        ("blobs", cell(str(len(found.blobs)))),
        ("temporary files", cell(str(len(found.temporary)))),
        ("checkpoints", cell(str(len(found.checkpoints)))),
        ("kept, too recent", cell(str(found.young))),
    ]
    data: dict[str, Any] = asdict(found) | {
        "temporary": [str(path) for path in found.temporary],
        "checkpoints": [str(path) for path in found.checkpoints],
    }
    hints = ["Delete it: registry gc"] if found.is_dry and found.bytes else []
    if found.unreadable:
        which = ", ".join(found.unreadable)
        hints.append(f"No blobs are deleted while manifests cannot be read: {which}. See registry verify")
    return Page(data=data, blocks=(fields(rows),), hints=tuple(hints))


def parse_time(text: str) -> float:
    """Parse a duration; return seconds.

    >>> parse_time("30m"), parse_time("0s")
    (1800.0, 0.0)

    Raises:
        InputError: It is not a number of seconds, minutes, hours or days.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a duration.", fix="write 30m, 24h or 7d: --older-than 24h")
    return int(match[1]) * _SECONDS[match[2]]
