"""`registry import`: a LoRA adapter saved by PEFT as a new domain."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Data, Device, Dtype, Json, RawRows, StorePath, Strict
from ..show import facts, output
from ..show.page import Cell, Page, Paragraph, Part, Span, cell, fields, line, title
from ..show.progress import show_progress
from ..startup import open_registry
from .add_domain import duplicate_record, duplicate_warning, warn_of_neighbours, warn_of_probe

if TYPE_CHECKING:
    from ...registry.interop.import_adapter import ImportResult
    from ...registry.store.manifest import PackManifest

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
    raw: RawRows = False,
    same_base: SameBase = False,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Import a LoRA adapter saved by PEFT as a new domain with the same outputs.

    --data is text of the domain: the router's statistics are computed from it, and part of it is held out for
    evaluation. Without it, unless NAME is a built-in domain, the adapter is never routed to: it is composed with
    constant weights (compose NAME:0.5+medicine:0.5 --static). Anything beyond plain LoRA on linear modules (DoRA,
    biases, modules_to_save) is refused by name.

    Near duplicates among the stored domains are pointed out as in add-domain, and the routing of everyday questions and
    of older domains' text is probed; with --strict, a domain that takes them is not stored (exit code 9).

    Example: registry import biology ./my-adapter --data biology.jsonl
    """
    registry = open_registry(store, device=device, dtype=dtype)
    with show_progress("loading the base model", as_json=as_json) as progress:
        imported = registry.import_adapter(
            name,
            adapter,
            data=data,
            raw=raw,
            same_base=same_base,
            strict=strict,
            on_neighbours=lambda found: warn_of_neighbours(found, progress, data or [], as_json=as_json),
            on_probe=lambda probe: warn_of_probe(probe, progress, as_json=as_json),
            on_progress=progress.on_progress,
        )
    output.show(imported_page(imported, data or []), command="import", as_json=as_json)


def imported_page(imported: "ImportResult", data: list[str]) -> Page:
    """Make the page about an import; `data` is --data as it was given."""
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
            "scores": imported.scores and imported.scores.as_json(),
            "drift": imported.drift and asdict(imported.drift),
            "chat_probe": imported.probe and imported.probe.as_json(),
            "routing": "text" if manifest.is_routed else "none",
            "neighbours": [facts.neighbour_record(near) for near in imported.neighbours],
            "near_duplicate": duplicate_record(imported.neighbours, data),
        },
        blocks=(
            title(f"{manifest.name} was imported", *duplicate_warning(imported.neighbours, data)),
            fields(rows),
            *((facts.scores(manifest),) if imported.scores else ()),
            *(facts.probe_warning(imported.probe) if imported.probe else ()),
            *(() if manifest.is_routed else (Paragraph(line(Span(_unrouted(manifest.name), "warn"))),)),
        ),
        hints=(f'Try it: registry compose {manifest.name}{_static(manifest)} --prompt "..."',),
    )


def _unrouted(name: str) -> str:
    return (
        f"Warning: {name} has no text, so nothing tells the router when to use it. It is used with constant weights "
        f"only: registry compose {name} --static. To have it routed, import it with --data FILE."
    )


def _static(manifest: "PackManifest") -> str:
    return "" if manifest.is_routed else " --static"
