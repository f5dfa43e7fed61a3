"""`registry log`: every version, and where it comes from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Json, StorePath
from ..show import facts, output
from ..show.page import Cell, Page, Span, cell, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry


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
    names = [name] if name else registry.store.domains(removed=True)
    versions = [version for each in names for version in history_of(registry, each)]
    output.show(log_page(sorted(versions, key=_newest_first, reverse=True)), command="log", as_json=as_json)


def history_of(registry: "Registry", name: str) -> list[dict[str, Any]]:
    """Return every version of a domain, oldest first, with its parent, aliases and state."""
    removed, aliases = registry.store.removed(name), registry.store.aliases(name)
    return [
        {
            "name": name,
            "version": manifest.version,
            "aliases": [alias for alias, version in aliases.items() if version == manifest.version],
            "parent": manifest.parent,
            "mode": manifest.lineage.get("mode"),
            "held_back": manifest.is_held_back,
            "removed": removed.get(manifest.version),
            "bits_per_byte": manifest.evaluation.get("routed"),
            "gate": manifest.evaluation.get("gate"),
            "created": manifest.created,
            "digest": manifest.digest,
        }
        for manifest in registry.store.history(name)
    ]


def _newest_first(version: dict[str, Any]) -> tuple[str, str, int]:
    return version["created"], version["name"], version["version"]


def log_page(versions: list[dict[str, Any]]) -> Page:
    """Make the list of versions, in the given order."""
    columns = ("VERSION", "ALIASES", "FROM", "MODE", "STATE", "BITS/BYTE", "CREATED")
    rows = table(columns, [_row(version) for version in versions], right=("BITS/BYTE",), no_wrap=columns)
    return Page(data={"versions": versions}, blocks=(rows,))


def _row(version: dict[str, Any]) -> Iterable[Cell]:
    parent = version["parent"]
    state = Span("removed", "faint") if version["removed"] else Span("held back", "warn")
    has_state = version["removed"] or version["held_back"]
    return [
        cell(f"{version['name']}@{version['version']}"),
        cell(", ".join(version["aliases"])),
        cell(f"{version['name']}@{parent}" if parent else "-", f"{version['name']}@{parent}" if parent else ""),
        cell(version["mode"] or "-", version["mode"] or ""),
        cell(state) if has_state else cell("-", ""),
        facts.number(version["bits_per_byte"]),
        facts.day(version["created"]),
    ]
