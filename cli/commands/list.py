"""`registry list`: the domains of a registry."""

from typing import TYPE_CHECKING

from ...adapters.composition import GENERAL
from ...domains.errors import LoraryError
from ..options import Json, StorePath
from ..show import facts, output
from ..show.numbers import exact, percent, short
from ..show.page import Cell, Page, cell, table
from ..startup import open_registry
from .log import refuse_unreadable

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.store.manifest import PackManifest


def list_domains(store: StorePath = None, as_json: Json = False) -> None:
    """List the domains of a registry with their scores.

    BITS/BYTE is measured on held-out text under routing (lower is better); GAIN is the relative reduction from the base
    model's bits per byte.

    Example: registry list
    """
    registry = open_registry(store)
    unreadable: dict[str, LoraryError] = {}
    output.show(list_page(registry, unreadable), command="list", as_json=as_json)
    refuse_unreadable(unreadable)


def list_page(registry: "Registry", unreadable: dict[str, LoraryError]) -> Page:
    """Make the list of the latest version of every domain; those that cannot be read go to `unreadable`."""
    manifests = registry.list(on_unreadable=unreadable.__setitem__)
    columns = ("NAME", "VERSION", "ROLE", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN", "CREATED")
    rows = table(
        columns,
        [_row(manifest) for manifest in manifests],
        right=("VERSION", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN"),
        no_wrap=columns,
    )
    hint = {
        0: "There is no KP bank yet. Resume its training: registry init",
        1: "Add a domain: registry add-domain medicine",
    }
    return Page(
        data={"store": str(registry.store.path), "domains": [_summary(manifest) for manifest in manifests]},
        blocks=(rows,),
        hints=(hint[len(manifests)],) if len(manifests) in hint else (),
    )


def _row(manifest: "PackManifest") -> list[Cell]:
    routed, gain = manifest.evaluation.get("routed"), facts.gain(manifest)
    total = facts.parameters(manifest)
    return [
        cell(manifest.name),
        cell(str(manifest.version)),
        cell("KP bank" if manifest.name == GENERAL else manifest.role, manifest.role),
        cell(str(facts.expert_count(manifest))),
        cell(short(total), total),
        facts.number(routed),
        cell(percent(gain, digits=1), exact(gain)),
        facts.day(manifest.created),
    ]


def _summary(manifest: "PackManifest") -> dict[str, object]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "role": manifest.role,
        "description": manifest.description,
        "experts": facts.expert_count(manifest),
        "parameters": facts.parameters(manifest),
        "bits_per_byte": manifest.evaluation.get("routed"),
        "gain": facts.gain(manifest),
        "created": manifest.created,
        "digest": manifest.digest,
    }
