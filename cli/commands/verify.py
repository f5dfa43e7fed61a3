"""`registry verify`: compare every stored file with its digest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import IntegrityError
from ..options import Json, StorePath
from ..show import output
from ..show.numbers import plural, size
from ..show.page import Block, Cell, Page, Paragraph, Span, cell, line, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.maintenance.verify import FileCheck

_STYLES = {"ok": "good", "bad": "bad", "missing": "bad"}


def verify(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF", help="NAME, NAME@2 or NAME@ALIAS.", show_default="everything in the registry"),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", metavar="", help="Also check each pack as strictly as one from outside; reads all tensors."
        ),
    ] = False,
    seal: Annotated[
        bool,
        typer.Option("--seal", metavar="", help="First keep digests of small files that an older program wrote."),
    ] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Read every file and compare it with its digest; exit with 5 if one is damaged or missing.

    Manifests, aliases, tombstones and the records of runs are compared with their seals; those of older programs have
    none, so that damage in them may go unnoticed until --seal.

    Example: registry verify --deep
    """
    registry = open_registry(store)
    found = registry.verify(ref, deep=deep, seal=seal)
    from ...registry.maintenance.verify import unsealed_files

    unsealed = len(unsealed_files(registry.store))
    output.show(verify_page(found, in_full=ref is not None, unsealed=unsealed), command="verify", as_json=as_json)
    damaged = [one for one in found if one.state != "ok"]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {plural(len(found), 'file')} are damaged or missing.",
            cause=f"first {damaged[0].reference}, {damaged[0].path}: {damaged[0].problem}",
            fix="restore the registry's folder from a backup; pull a domain again if it came from the Hub",
        )


def verify_page(found: "Sequence[FileCheck]", *, in_full: bool, unsealed: int = 0) -> Page:
    """Make the page: files by version and state; single files if one is damaged or `in_full`."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        counts.setdefault(one.reference, Counter())[one.state] += 1
    columns = ("VERSION", "OK", "BAD", "MISSING")
    rows = [
        [cell(name), *(_count(state, counted[state]) for state in ("ok", "bad", "missing"))]
        for name, counted in counts.items()
    ]
    blocks: list[Block] = [] if in_full else [table(columns, rows, right=columns[1:], no_wrap=columns)]
    shown = [one for one in found if in_full or one.state != "ok"]
    if shown:
        files = [[cell(one.reference), cell(one.path), _state(one.state), cell(one.problem)] for one in shown]
        blocks.append(table(("VERSION", "FILE", "STATE", "PROBLEM"), files, no_wrap=("VERSION", "STATE")))
    total = sum(one.size for one in found)
    summary = line(f"{plural(len(found), 'file')} of {size(total)} read")
    data = {
        "files": [asdict(one) for one in found],
        "whole": all(one.state == "ok" for one in found),
        "unsealed": unsealed,
    }
    hint = f"{plural(unsealed, 'small file')} of an older program without a digest: registry verify --seal"
    return Page(data=data, blocks=(*blocks, Paragraph(summary, in_pipes=False)), hints=(hint,) if unsealed else ())


def _count(state: str, number: int) -> Cell:
    return cell(Span(str(number), _STYLES[state] if number and state != "ok" else ""), number)


def _state(state: str) -> Cell:
    return cell(Span(state.upper(), _STYLES[state]), state)
