"""`registry log`, `alias`, `remove` and `restore`: versions, where they come from and what they are called."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...domains.errors import InputError
from ..options import Json, Reference, StorePath
from ..show import facts as of
from ..show import output
from ..show.page import Cell, Page, Span, cell, facts, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.store.manifest import PackManifest


def log(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A domain.", show_default="all of them")] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """List every version, newest first: from which one it was retrained and how, whether it was held back or removed.

    A version that did worse than its parent on the parent's held-out text is held back: latest does not move to it.

    Example: registry log medicine
    """
    registry = open_registry(store)
    names = [name] if name else registry.store.domains(removed=True)
    versions = [version for each in names for version in history_of(registry, each)]
    output.show(log_page(sorted(versions, key=_newest_first, reverse=True)), command="log", as_json=as_json)


def history_of(registry: "Registry", name: str) -> list[dict[str, Any]]:
    """Every version of a domain, oldest first, with what it came from and what became of it."""
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
    """Versions, in the given order."""
    columns = ("VERSION", "ALIASES", "FROM", "MODE", "STATE", "BITS/BYTE", "CREATED")
    rows = table(columns, [_row(version) for version in versions], right=("BITS/BYTE",), tight=columns)
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
        of.number(version["bits_per_byte"]),
        of.day(version["created"]),
    ]


def alias(
    ref: Reference,
    alias: Annotated[
        str | None, typer.Argument(metavar="ALIAS", help="What the version is to be called.", show_default="list them")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", metavar="", help="Take the alias away.")] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Name a version, move a name to another version, or list the names of a domain's versions.

    latest is what a bare NAME means; moving it to a version that was held back accepts that version.

    Example: registry alias medicine@2 production
    """
    registry = open_registry(store)
    manifest = registry.show(ref)
    name = manifest.name
    if remove and alias is None:
        named = ref.partition("@")[2] or "ALIAS"
        raise InputError("--remove needs the alias.", fix=f"registry alias {name} {named} --remove")
    if remove:
        registry.store.drop_alias(name, str(alias))
    elif alias is not None:
        registry.store.set_alias(name, alias, manifest.version)
    output.show(aliases_page(registry, name), command="alias", as_json=as_json)


def aliases_page(registry: "Registry", name: str) -> Page:
    """What the versions of a domain are called."""
    found = registry.store.aliases(name)
    rows = [[cell(alias), cell(f"{name}@{version}")] for alias, version in found.items()]
    return Page(data={"name": name, "aliases": found}, blocks=(table(("ALIAS", "VERSION"), rows, tight=("ALIAS",)),))


def remove(
    ref: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Remove one version. restore brings it back, until gc deletes its files; its number is never used again.

    Where latest means it, latest moves to the newest version that is not held back.

    Example: registry remove medicine@2
    """
    registry = open_registry(store)
    manifest = registry.store.check_removable(ref)  # before asking
    name = of.reference(manifest)
    if not yes and not output.confirmed(
        f"Remove {name} ({manifest.description})?", instead=f"registry remove {name} -y"
    ):
        output.hint("Nothing is removed.")
        raise typer.Exit(1)
    registry.remove(name)
    output.show(changed_page(registry, manifest, "removed"), command="remove", as_json=as_json)


def restore(ref: Reference, store: StorePath = None, as_json: Json = False) -> None:
    """Bring a removed version back; a NAME alone means the version that was removed last. Aliases stay where they are.

    Example: registry restore medicine@2
    """
    registry = open_registry(store)
    manifest = registry.restore(ref)
    output.show(changed_page(registry, manifest, "restored"), command="restore", as_json=as_json)


def changed_page(registry: "Registry", manifest: "PackManifest", what: str) -> Page:
    """What a domain has after one of its versions was removed or restored."""
    name = manifest.name
    versions = registry.store.versions(name)
    latest = registry.store.manifest(name).version if versions else None
    rows = [
        (what, cell(of.reference(manifest))),
        ("versions", cell(", ".join(map(str, versions)) or "none is left")),
        ("latest", cell(f"{name}@{latest}")) if latest else None,
    ]
    hints = {
        "removed": f"Bring it back: registry restore {of.reference(manifest)}",
        "restored": f"Make it the one that {name} means: registry alias {of.reference(manifest)} latest",
    }
    is_latest = what == "restored" and latest == manifest.version
    data = {"name": name, "version": manifest.version, what: True, "versions": versions, "latest": latest}
    return Page(data=data, blocks=(facts(rows),), hints=() if is_latest else (hints[what],))
