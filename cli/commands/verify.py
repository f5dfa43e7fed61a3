"""`registry verify`, `gc` and `doctor`: whether all is whole, what nothing needs, and how the machine is."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...domains.errors import InputError, IntegrityError
from ..options import Json, StorePath
from ..show import output
from ..show.numbers import plural, size
from ..show.page import Block, Cell, Page, Span, Words, cell, facts, line, table
from ..show.watch import watch
from ..startup import open_registry, quiet_libraries

if TYPE_CHECKING:
    from ...registry.maintenance.doctor import Finding
    from ...registry.maintenance.verify import FileCheck
    from ...registry.store.gc import Collected

_STYLES = {"ok": "good", "warn": "warn", "bad": "bad", "missing": "bad"}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def verify(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF", help="NAME, NAME@2 or NAME@ALIAS.", show_default="everything in the registry"),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", metavar="", help="Prove each pack as one from outside is proved; reads all tensors."),
    ] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Read every file again and compare it with its digest; exit with 5 if anything is damaged or missing.

    Example: registry verify --deep
    """
    from ...registry.maintenance.verify import verify_store, verify_version

    registry = open_registry(store)
    if ref is None:
        found = list(verify_store(registry.store, deep=deep))
    else:
        manifest = registry.show(ref)
        found = list(verify_version(registry.store, manifest.name, manifest.version, deep=deep))
    output.show(verify_page(found, in_full=ref is not None), command="verify", as_json=as_json)
    damaged = [one for one in found if one.state != "ok"]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {plural(len(found), 'file')} are not as they were stored.",
            cause=f"first {damaged[0].reference}, {damaged[0].path}: {damaged[0].problem}",
            fix="restore the registry's folder from a backup; a domain that was pulled can be pulled again",
        )


def verify_page(found: "list[FileCheck]", *, in_full: bool) -> Page:
    """Each version with its files counted by state; each file where one version is asked for or a file is not whole."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        counts.setdefault(one.reference, Counter())[one.state] += 1
    columns = ("VERSION", "OK", "BAD", "MISSING")
    rows = [
        [cell(name), *(_count(state, counted[state]) for state in ("ok", "bad", "missing"))]
        for name, counted in counts.items()
    ]
    blocks: list[Block] = [] if in_full else [table(columns, rows, right=columns[1:], tight=columns)]
    shown = [one for one in found if in_full or one.state != "ok"]
    if shown:
        files = [[cell(one.reference), cell(one.path), _state(one.state), cell(one.problem)] for one in shown]
        blocks.append(table(("VERSION", "FILE", "STATE", "PROBLEM"), files, tight=("VERSION", "STATE")))
    total = sum(one.size for one in found)
    summary = line(f"{plural(len(found), 'file')} of {size(total)} read")
    data = {"files": [asdict(one) for one in found], "whole": all(one.state == "ok" for one in found)}
    return Page(data=data, blocks=(*blocks, Words(summary, in_pipes=False)))


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only say what would be deleted.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Spare what was touched since: 30m, 24h, 7d.")
    ] = "24h",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Delete what nothing needs: files of versions that were removed, and what crashes and refused pulls left behind.

    A version that was removed longer ago than --older-than cannot be restored afterwards. Everything that a version
    needs stays, and so does what another process may be about to store.

    Example: registry gc --dry-run
    """
    from ...registry.store.gc import collect_garbage

    grace_s = parse_time(older_than)
    registry = open_registry(store)
    with watch("looking for what nothing needs", as_json=as_json):
        found = collect_garbage(registry.store, grace_s=grace_s, dry_run=dry_run)
    output.show(gc_page(found), command="gc", as_json=as_json)


def gc_page(found: "Collected") -> Page:
    """What was deleted."""
    rows = [
        ("would delete" if found.is_dry else "deleted", cell(size(found.bytes), found.bytes)),
        ("blobs", cell(str(len(found.blobs)))),
        ("temporary files", cell(str(len(found.temporary)))),
        ("checkpoints", cell(str(len(found.checkpoints)))),
        ("spared, too young", cell(str(found.young))),
    ]
    data: dict[str, Any] = asdict(found) | {
        "temporary": [str(path) for path in found.temporary],
        "checkpoints": [str(path) for path in found.checkpoints],
    }
    return Page(data=data, blocks=(facts(rows),), hints=("Do it: registry gc",) if found.is_dry and found.bytes else ())


def doctor(store: StorePath = None, as_json: Json = False) -> None:
    """Show versions, devices, the registry's health and what its file system can do; to be pasted into a report.

    Example: registry doctor
    """
    from ...registry.maintenance.doctor import examine
    from ...registry.store.store import locate_store

    quiet_libraries()
    found = examine(locate_store(store, os.environ, Path.cwd()))
    output.show(doctor_page(found), command="doctor", as_json=as_json)


def doctor_page(found: "Iterable[Finding]") -> Page:
    """Findings, with what can be done about those that are not good."""
    found = list(found)
    rows = [(one.what, _finding(one)) for one in found]
    hints = tuple(f"{one.what}: {one.fix}" for one in found if one.verdict != "ok" and one.fix)
    return Page(data={"findings": [asdict(one) for one in found]}, blocks=(facts(rows),), hints=hints)


def parse_time(text: str) -> float:
    """Seconds.

    >>> parse_time("30m"), parse_time("0s")
    (1800.0, 0.0)

    Raises:
        InputError: It is no number of seconds, minutes, hours or days.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    if match is None:
        raise InputError(f"{text!r} is no length of time.", fix="write 30m, 24h or 7d: --older-than 24h")
    return int(match[1]) * _SECONDS[match[2]]


def _count(state: str, number: int) -> Cell:
    return cell(Span(str(number), _STYLES[state] if number and state != "ok" else ""), number)


def _state(state: str) -> Cell:
    return cell(Span(state.upper(), _STYLES[state]), state)


def _finding(one: "Finding") -> Cell:
    return cell(line(Span(one.value, "" if one.verdict == "ok" else _STYLES[one.verdict])), one.value)
