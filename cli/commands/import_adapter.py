"""`registry import`: an adapter that PEFT saved becomes a domain."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Data, Device, Dtype, Json, StorePath, sources
from ..show import facts as of
from ..show import output
from ..show.page import Cell, Page, Part, cell, facts, title
from ..show.watch import watch
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.interop.import_adapter import ImportResult

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the new domain is called.", show_default=False)]
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A folder with adapter_config.json and adapter_model.safetensors, or OWNER/REPO of the Hub.",
        show_default=False,
    ),
]
SameBase = Annotated[
    bool,
    typer.Option(
        "--same-base",
        metavar="",
        help="The base model that the adapter names is this registry's under another name. Widths are checked anyhow.",
    ),
]


def import_adapter(
    name: Name,
    adapter: Adapter,
    data: Data = None,
    same_base: SameBase = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Import a LoRA adapter that PEFT saved: it becomes a new domain, and computes what it computed there.

    --data is text of the domain, by which the router will know it; some of it is held out to measure. What is more than
    B A for linear modules (DoRA, biases, saved modules and so on) is refused by name, never left out.

    Example: registry import biology ./my-adapter --data biology.jsonl
    """
    registry = open_registry(store, device=device, dtype=dtype)
    with watch("loading the base model", as_json=as_json) as watching:
        imported = registry.import_adapter(
            name, adapter, data=sources(data), same_base=same_base, on_progress=watching.on_progress
        )
    output.show(imported_page(imported), command="import", as_json=as_json)


def imported_page(imported: "ImportResult") -> Page:
    """What the import brought."""
    manifest = imported.manifest
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(of.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("training", of.training(manifest)),
        ("neighbours", of.neighbours(imported.neighbours)),
        ("routing drift", of.drift(manifest)),
    ]
    return Page(
        data={
            **of.record(manifest),
            "imported": manifest.train["imported"],
            "scores": imported.scores.as_json(),
            "drift": asdict(imported.drift),
            "neighbours": [of.neighbour_record(near) for near in imported.neighbours],
        },
        blocks=(title(f"{manifest.name} is imported"), facts(rows), of.scores(manifest)),
        hints=(f'Try it: registry compose {manifest.name} --prompt "..."',),
    )
