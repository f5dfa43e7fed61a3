"""`registry add-domain`: new experts for a domain, everything older frozen and proved so."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import manifest_facts as of
from . import output
from .opening import open_registry
from .options import BankOptions, Data, Device, Dtype, Json, StorePath, TrainingOptions, sources, takes_groups
from .page import Cell, Page, Part, Span, cell, facts, line, title
from .plan import plan_addition
from .watch import watch

if TYPE_CHECKING:
    from ..registry.add_domain import AddedDomain

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A built-in domain, or any name together with --data.", show_default=False)
]


@takes_groups
def add_domain(
    *,
    name: Name,
    data: Data = None,
    bank: BankOptions,
    training: TrainingOptions,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Add a domain: train new experts for it, with everything older frozen and proved to be unchanged.

    medicine, legal, finance and code come with a sample corpus and need no --data. A repeated command resumes an
    interrupted one from its last checkpoint.

    Example: registry add-domain medicine
    """
    registry = open_registry(store, device=device, dtype=dtype)
    shape, files = bank.config(), sources(data)
    plan = plan_addition(registry, name, files, shape, steps=training.steps)
    if not as_json:
        output.hint(str(plan))
    with watch("loading the base model", as_json=as_json) as watching:
        added = registry.add_domain(
            name, data=files, bank=shape, training=training.config(), on_progress=watching.on_progress
        )
    output.show(added_page(added), command="add-domain", as_json=as_json)


def added_page(added: "AddedDomain") -> Page:
    """What adding the domain brought."""
    manifest = added.manifest
    optional: list[tuple[str, Cell | None]] = [
        ("loss", of.loss(manifest)),
        ("neighbours", of.neighbours(added.neighbours)),
        ("warm start", cell(f"from the experts of {added.lender}") if added.lender else None),
        ("routing drift", of.drift(manifest)),
        ("frozen", of.proof(manifest)),
    ]
    resumed = [("resumed", cell(f"from step {added.resumed_from}"))] if added.resumed_from else []
    rows: list[tuple[str, Cell | Part]] = [
        ("version", cell(of.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("training", of.training(manifest)),
        *resumed,
        *((label, value) for label, value in optional if value),
    ]
    return Page(
        data=_data(added),
        blocks=(title(f"{manifest.name} is added", *_warning(added)), facts(rows), of.scores(manifest)),
        hints=(f'Try it: registry compose {manifest.name} --prompt "..."',),
    )


def near_duplicate(added: "AddedDomain") -> str | None:
    """The older domain that is probably the same, if there is one."""
    near = [name for name, similarity in added.neighbours if similarity >= of.NEAR_DUPLICATE]
    return near[0] if near else None


def _warning(added: "AddedDomain") -> tuple[Part, ...]:
    twin = near_duplicate(added)
    if twin is None:
        return ()
    return line("\n", Span(f"Its text is nearly that of {twin}: is it the same domain?", "warn"))


def _data(added: "AddedDomain") -> dict[str, object]:
    manifest = added.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "parameters": of.parameters(manifest),
        "experts_per_layer": list(manifest.allocation["counts"]),
        "scores": added.scores.as_json(),
        "drift": asdict(added.drift),
        "neighbours": [{"name": name, "similarity": round(near, 5)} for name, near in added.neighbours],
        "near_duplicate": near_duplicate(added),
        "warm_start": added.lender,
        "resumed_from": added.resumed_from,
        "losses": manifest.train["losses"],
        "seconds": manifest.train["seconds"],
        "proof": manifest.proof,
    }
