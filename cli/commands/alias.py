"""`registry alias`: movable names of versions."""

from typing import Annotated

import typer

from ...adapters.composition import parse_reference
from ..options import Json, Reference, StorePath
from ..show import output
from ..show.page import Page, cell, table
from ..startup import open_registry


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
    aliases = registry.alias(ref, alias, remove=remove)
    output.show(aliases_page(parse_reference(ref)[0], aliases), command="alias", as_json=as_json)


def aliases_page(name: str, aliases: dict[str, int]) -> Page:
    """Make the list of a domain's aliases."""
    rows = [[cell(alias), cell(f"{name}@{version}")] for alias, version in aliases.items()]
    return Page(
        data={"name": name, "aliases": aliases}, blocks=(table(("ALIAS", "VERSION"), rows, no_wrap=("ALIAS",)),)
    )
