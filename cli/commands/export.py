"""`registry export`: domains for the tools of others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..options import Device, Dtype, Json, Spec, Static, StorePath
from ..show import output
from ..show.page import Cell, Page, Part, Words, cell, facts, line, title
from ..show.watch import watch
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.interop.export_plan import ExportResult

Form = Literal["peft", "vllm", "merged", "tar"]
To = Annotated[
    Form,
    typer.Option(
        "--to",
        metavar="FORM",
        help="peft or vllm: an adapter; merged: a whole checkpoint of transformers; tar: the pack itself.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="PATH", help="A new folder; a new file for tar.", show_default=False)
]
ServedBase = Annotated[
    str | None,
    typer.Option(
        "--served-base",
        metavar="NAME",
        help="What the base model is called where vLLM serves it.",
        show_default="its Hub id, or its folder",
    ),
]
_LABELS = {
    "rank": "rank",
    "served_name": "served as",
    "max_rank": "--max-lora-rank",
    "numbers": "numbers",
    "difference": "checked",
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
    """Export domains to PEFT, vLLM, a merged checkpoint, or an archive.

    An adapter and a merged checkpoint have constant gates: the means on each domain's own text. One domain by itself
    is exported so; several, whose routing would be lost, only with --static. A merged checkpoint is in the numbers of
    --dtype, and is compared with the composed model before it gets its name.

    Example: registry export medicine --to vllm --out medicine-vllm
    """
    registry = open_registry(store, device=device, dtype=dtype)
    with watch("exporting", as_json=as_json):
        exported = registry.export(spec, out, to=to, static=static, served_base=served_base)
    output.show(exported_page(exported, to), command="export", as_json=as_json)


def exported_page(exported: "ExportResult", to: Form) -> Page:
    """What was written, and how to use it."""
    rows: list[tuple[str, Cell | Part]] = [("versions", cell(exported.pinned))]
    if to != "tar":
        rows.append(("gates", cell("constant: the means on each domain's own text, instead of routing")))
    rows += [(_LABELS[key], _value(key, value)) for key, value in exported.facts.items()]
    rows.append(("written", cell(str(exported.out))))
    data = {"versions": exported.pinned, "to": to, "out": str(exported.out), "use": exported.command}
    return Page(
        data={**data, **exported.facts},
        blocks=(title("Exported"), facts(rows), Words(line(exported.command))),
    )


def _value(key: str, value: str | int | float) -> Cell:
    if key == "difference":
        return cell(f"its logits are the composed model's within {value:.1g} of the largest", f"{value:g}")
    return cell(str(value))
