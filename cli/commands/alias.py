"""`registry alias`: movable names of versions."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import InputError
from ..options import Json, Reference, StorePath
from ..show import output
from ..show.page import Page, cell, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry


def alias(
    ref: Reference,
    alias: Annotated[
        str | None,
        typer.Argument(metavar="ALIAS", help="The alias to set for this version.", show_default="list all aliases"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", metavar="", help="Remove the alias.")] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Set, move, remove or list the aliases of a domain's versions.

    A bare NAME means the alias latest. Moving latest to a version that was held back accepts that version.

    Example: registry alias medicine@2 production
    """
    registry = open_registry(store)
    manifest = registry.show(ref)
    name = manifest.name
    if remove and alias is None:
        named = ref.partition("@")[2] or "ALIAS"
        raise InputError("--remove needs an alias.", fix=f"registry alias {name} {named} --remove")
    if remove:
        registry.store.drop_alias(name, str(alias))
    elif alias is not None:
        registry.store.set_alias(name, alias, manifest.version)
    output.show(aliases_page(registry, name), command="alias", as_json=as_json)


def aliases_page(registry: "Registry", name: str) -> Page:
    """Make the list of a domain's aliases."""
    found = registry.store.aliases(name)
    rows = [[cell(alias), cell(f"{name}@{version}")] for alias, version in found.items()]
    return Page(data={"name": name, "aliases": found}, blocks=(table(("ALIAS", "VERSION"), rows, no_wrap=("ALIAS",)),))
