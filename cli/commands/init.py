"""`registry init`: a registry for a base model, with its knowledge-preservation bank trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import BankOptions, Data, Device, Dtype, Json, StorePath, TrainingOptions, sources, takes_groups
from ..show import facts as of
from ..show import output
from ..show.page import Page, cell, facts, title
from ..show.watch import watch
from ..startup import fetch_base, quiet_libraries, store_option

if TYPE_CHECKING:
    from ...registry import Registry

BaseModel = Annotated[str, typer.Option("--base", metavar="MODEL", help="pocket, a folder, or a Hub id.")]
Revision = Annotated[
    str | None, typer.Option(metavar="COMMIT", help="A commit of the Hub model.", show_default="its newest")
]
Folder = Annotated[
    Path | None, typer.Argument(metavar="PATH", help="The registry's folder, as with --store.", show_default=False)
]


@takes_groups
def init(
    *,
    path: Folder = None,
    base: BaseModel = "pocket",
    revision: Revision = None,
    data: Data = None,
    bank: BankOptions,
    training: TrainingOptions,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Make a registry for a base model and train its knowledge-preservation bank on general text.

    Without --data the bundled general corpus is used. A repeated command resumes an interrupted one.

    Example: registry init --base pocket
    """
    from ...registry import Registry

    shape = bank.config()
    fetch_base(base, revision)
    quiet_libraries()
    with watch("loading the base model", as_json=as_json) as watching:
        registry = Registry.init(
            path or store,
            base=base,
            revision=revision,
            data=sources(data),
            bank=shape,
            training=training.config(),
            device=device,
            dtype=dtype,
            on_progress=watching.on_progress,
        )
    output.show(init_page(registry), command="init", as_json=as_json)


def init_page(registry: "Registry") -> Page:
    """What was made."""
    manifest = registry.show(GENERAL)
    loss, proof = of.loss(manifest), of.proof(manifest)
    rows = [
        ("registry", cell(str(registry.store.path))),
        ("base", of.base(manifest)),
        ("bank", cell(of.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("training", of.training(manifest)),
        ("loss", loss) if loss else None,
        ("frozen", proof) if proof else None,
    ]
    return Page(
        data={
            "store": str(registry.store.path),
            **of.record(manifest),
            "base": {"id": manifest.base.id, "revision": manifest.base.revision, "weights": manifest.base.weights},
            "losses": manifest.train["losses"],
            "scores": manifest.evaluation,
            "proof": manifest.proof,
        },
        blocks=(title("A registry is ready"), facts(rows), of.scores(manifest)),
        hints=(f"Add a domain: registry add-domain medicine{store_option(registry.store.path)}",),
    )
