"""`registry export`: domains for PEFT, vLLM and transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..options import Device, Dtype, Json, Spec, Static, StorePath
from ..show import output
from ..show.page import Cell, Page, Paragraph, Part, cell, fields, line, title
from ..show.progress import show_progress
from ..startup import open_registry
from .push import warn_of_named_others

if TYPE_CHECKING:
    from ...registry.interop.export_plan import ExportResult

Form = Literal["peft", "vllm", "merged", "tar"]
To = Annotated[
    Form,
    typer.Option(
        "--to",
        metavar="FORM",
        help="peft or vllm: an adapter; merged: a transformers checkpoint; tar: an archive of the pack.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="PATH", help="A new folder; for tar, a new file.", show_default=False)
]
ServedBase = Annotated[
    str | None,
    typer.Option(
        "--served-base",
        metavar="NAME",
        help="Name of the base model on the vLLM server.",
        show_default="its Hub id, or its folder",
    ),
]
_LABELS = {
    "rank": "rank",
    "served_name": "served as",
    "max_rank": "--max-lora-rank",
    "numbers": "dtype",
    "difference": "verified",
    "files": "files",
}


def export(
    spec: Spec,
    to: To,
    out: Out,
    static: Static = False,
    served_base: ServedBase = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Export domains to PEFT, vLLM, a merged transformers checkpoint, or an archive.

    Adapters and merged checkpoints have constant gates: the means on each domain's own text. They cannot route, so
    several domains need --static. A merged checkpoint has the dtype of --dtype, and its logits are compared with those
    of the composed model before it is stored.

    Example: registry export medicine --to vllm --out medicine-vllm
    """
    registry = open_registry(store, device=device, dtype=dtype)
    with show_progress("exporting", as_json=as_json):
        exported = registry.export(spec, out, to=to, static=static, served_base=served_base)
    if to == "tar":
        warn_of_named_others(registry.show(exported.pinned), as_json=as_json)
    output.show(exported_page(exported, to), command="export", as_json=as_json)


def exported_page(exported: "ExportResult", to: Form) -> Page:
    """Make the page about an export, with the command that uses it."""
    rows: list[tuple[str, Cell | Part]] = [("versions", cell(exported.pinned))]
    if to != "tar":
        rows.append(("gates", cell("constant: the means on each domain's own text, no routing")))
    rows += [(_LABELS[key], _value(key, value)) for key, value in exported.facts.items()]
    rows.append(("written", cell(str(exported.out))))
    data = {"versions": exported.pinned, "to": to, "out": str(exported.out), "use": exported.command}
    return Page(
        data={**data, **exported.facts},
        blocks=(title("Exported"), fields(rows), Paragraph(line(exported.command))),
    )


def _value(key: str, value: str | int | float) -> Cell:
    if key == "difference":
        return cell(
            f"logits match the composed model: largest difference {value:.1g}, relative to the largest logit",
            f"{value:g}",
        )
    return cell(str(value))
