"""`registry import`: a LoRA adapter saved by PEFT as a new domain."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Data, Device, Dtype, Json, StorePath, Strict
from ..show import facts, output
from ..show.page import Cell, Page, Part, cell, fields, title
from ..show.progress import show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.interop.import_adapter import ImportResult

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the new domain.", show_default=False)]
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A folder with adapter_config.json and adapter_model.safetensors, or OWNER/REPO on the Hub.",
        show_default=False,
    ),
]
SameBase = Annotated[
    bool,
    typer.Option(
        "--same-base",
        metavar="",
        help="The adapter's base model is this registry's under another name; shapes are still checked.",
    ),
]


def import_adapter(
    name: Name,
    adapter: Adapter,
    data: Data = None,
    same_base: SameBase = False,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Import a LoRA adapter saved by PEFT as a new domain with the same outputs.

    --data is text of the domain: the router's statistics are computed from it, and part of it is held out for
    evaluation. Anything beyond plain LoRA on linear modules (DoRA, biases, modules_to_save) is refused by name.

    The routing of everyday questions and of older domains' text is probed as in add-domain; with --strict, a domain
    that takes them is not stored (exit code 9).

    Example: registry import biology ./my-adapter --data biology.jsonl
    """
    registry = open_registry(store, device=device, dtype=dtype)
    with show_progress("loading the base model", as_json=as_json) as progress:
        imported = registry.import_adapter(
            name, adapter, data=data, same_base=same_base, strict=strict, on_progress=progress.on_progress
        )
    output.show(imported_page(imported), command="import", as_json=as_json)


def imported_page(imported: "ImportResult") -> Page:
    """Make the page about an import."""
    manifest = imported.manifest
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(facts.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", facts.experts(manifest)),
        ("per layer", facts.per_layer(manifest.allocation["counts"])),
        ("training", facts.training(manifest)),
        ("neighbours", facts.neighbours(imported.neighbours)),
        ("routing drift", facts.drift(manifest)),
        ("everyday chat", facts.chat(manifest)),
    ]
    return Page(
        data={
            **facts.record(manifest),
            "imported": manifest.train["imported"],
            "scores": imported.scores.as_json(),
            "drift": asdict(imported.drift),
            "chat_probe": imported.probe.as_json(),
            "neighbours": [facts.neighbour_record(near) for near in imported.neighbours],
        },
        blocks=(
            title(f"{manifest.name} was imported"),
            fields(rows),
            facts.scores(manifest),
            *facts.probe_warning(imported.probe),
        ),
        hints=(f'Try it: registry compose {manifest.name} --prompt "..."',),
    )
