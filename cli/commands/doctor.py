"""`registry doctor`: the state of this machine and of the registry."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..options import Json, StorePath
from ..show import output
from ..show.page import Cell, Page, Span, cell, fields, line
from ..startup import quiet_libraries

if TYPE_CHECKING:
    from ...registry.maintenance.doctor import Finding

_STYLES = {"ok": "", "warn": "warn", "bad": "bad"}


def doctor(store: StorePath = None, as_json: Json = False) -> None:
    """Show versions, devices, the registry's state and what its file system supports, for a bug report.

    Example: registry doctor
    """
    from ...registry import Registry

    quiet_libraries()
    output.show(doctor_page(Registry.doctor(store)), command="doctor", as_json=as_json)


def doctor_page(found: "Sequence[Finding]") -> Page:
    """Make the page of findings, with a hint for each problem that can be fixed."""
    rows = [(one.what, _finding(one)) for one in found]
    hints = tuple(f"{one.what}: {one.fix}" for one in found if one.verdict != "ok" and one.fix)
    return Page(data={"findings": [asdict(one) for one in found]}, blocks=(fields(rows),), hints=hints)


def _finding(one: "Finding") -> Cell:
    return cell(line(Span(one.value, _STYLES[one.verdict])), one.value)
