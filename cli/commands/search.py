"""`registry search`: packs on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Json
from ..show import facts, output
from ..show.numbers import exact, percent
from ..show.page import Cell, Page, cell, table
from ..show.progress import show_progress
from ..startup import quiet_libraries

if TYPE_CHECKING:
    from ...registry.hub.search import SearchResult


def search(
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="Words in the name.", show_default="all packs")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only packs for this base model.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Maximum number of packs.")] = 20,
    as_json: Json = False,
) -> None:
    """Search the Hub for packs. Scores are taken from model cards; a pack is verified when it is pulled.

    Example: registry search legal --base meta-llama/Llama-3.2-1B
    """
    from ...registry import Registry

    quiet_libraries()
    with show_progress("searching the Hub", as_json=as_json) as progress:
        found = Registry.search(query, base=base, limit=limit, on_progress=progress.on_progress)
    output.show(search_page(found), command="search", as_json=as_json)


def search_page(found: "Sequence[SearchResult]") -> Page:
    """Make the list of packs."""
    columns = ("REPOSITORY", "DOMAIN", "VERSION", "BASE", "BITS/BYTE", "GAIN", "DOWNLOADS", "UPDATED")
    rows = table(
        columns,
        [_row(pack) for pack in found],
        right=("VERSION", "BITS/BYTE", "GAIN", "DOWNLOADS"),
        no_wrap=("REPOSITORY", "UPDATED"),
    )
    hint = f"Pull one: registry pull {found[0].repo}" if found else "No pack was found. List all: registry search"
    return Page(data={"packs": [asdict(pack) for pack in found]}, blocks=(rows,), hints=(hint,))


def _row(pack: "SearchResult") -> list[Cell]:
    gain = facts.reduction(pack.bits_per_byte_of_base, pack.bits_per_byte)
    return [
        cell(pack.repo),
        cell(pack.name or "-"),
        cell(str(pack.version or "-")),
        cell(pack.base or "-"),
        facts.number(pack.bits_per_byte),
        cell(percent(gain, digits=1), exact(gain)),
        cell(f"{pack.downloads:,}", pack.downloads),
        facts.day(pack.updated),
    ]
