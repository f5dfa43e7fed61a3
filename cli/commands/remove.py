"""`registry remove` and `restore`: remove a version, and undo that."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Json, Reference, StorePath
from ..show import facts, output
from ..show.page import Page, cell, fields
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.store.manifest import PackManifest


def remove(
    ref: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask for confirmation.")] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Remove one version. registry restore undoes this until registry gc deletes the files.

    If latest points to the version, it moves to the newest one that was not held back. Version numbers are never
    reused.

    Example: registry remove medicine@2
    """
    registry = open_registry(store)
    manifest = registry.store.check_removable(ref)  # before asking
    name = facts.reference(manifest)
    if not yes and not output.confirm(f"Remove {name} ({manifest.description})?", instead=f"registry remove {name} -y"):
        output.hint("Nothing was removed.")
        raise typer.Exit(1)
    registry.remove(name)
    output.show(changed_page(registry, manifest, "removed"), command="remove", as_json=as_json)


def restore(ref: Reference, store: StorePath = None, as_json: Json = False) -> None:
    """Restore a removed version; a bare NAME means the version that was removed last. Aliases do not move.

    Example: registry restore medicine@2
    """
    registry = open_registry(store)
    manifest = registry.restore(ref)
    output.show(changed_page(registry, manifest, "restored"), command="restore", as_json=as_json)


def changed_page(registry: "Registry", manifest: "PackManifest", what: str) -> Page:
    """Make the page about a domain one of whose versions was removed or restored."""
    name = manifest.name
    versions = registry.store.versions(name)
    latest = registry.store.manifest(name).version if versions else None
    rows = [
        (what, cell(facts.reference(manifest))),
        ("versions", cell(", ".join(map(str, versions)) or "none")),
        ("latest", cell(f"{name}@{latest}")) if latest else None,
    ]
    hints = {
        "removed": f"Undo: registry restore {facts.reference(manifest)}",
        "restored": f"Make it the latest version of {name}: registry alias {facts.reference(manifest)} latest",
    }
    is_latest = what == "restored" and latest == manifest.version
    data = {"name": name, "version": manifest.version, what: True, "versions": versions, "latest": latest}
    return Page(data=data, blocks=(fields(rows),), hints=() if is_latest else (hints[what],))
