"""`registry add-domain`: new experts for a domain, everything older frozen and proved so."""

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import BankOptions, Data, Device, Dtype, Json, StorePath, TrainingOptions, sources, takes_groups
from ..show import facts as of
from ..show import output
from ..show.page import Cell, Page, Part, Span, cell, facts, line, title
from ..show.plan import plan_addition
from ..show.watch import Watch, watch
from ..startup import open_registry

if TYPE_CHECKING:
    from ...domains.statistics.prototypes import Neighbour
    from ...registry.learn.add_domain import AddedDomain

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
            name,
            data=files,
            bank=shape,
            training=training.config(),
            on_neighbours=lambda found: _point_out(found, watching, data or [], as_json=as_json),
            on_progress=watching.on_progress,
        )
    output.show(added_page(added, data or []), command="add-domain", as_json=as_json)


def _point_out(found: "list[Neighbour]", watching: Watch, data: list[str], *, as_json: bool) -> None:
    """Tells, before training begins, of a stored domain whose text is nearly the same; the run goes on."""
    from ...domains.statistics.prototypes import find_near_duplicate

    twin = find_near_duplicate(found)
    if twin and as_json:
        output.tell_json({"near_duplicate": _twin_data(twin, data)})
    elif twin:
        watching.say(_twin_text(twin, data))


def added_page(added: "AddedDomain", data: list[str]) -> Page:
    """What adding the domain brought; `data` is how the command named its files."""
    manifest = added.manifest
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(of.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("training", of.training(manifest)),
        ("resumed", f"from step {added.resumed_from}" if added.resumed_from else None),
        ("loss", of.loss(manifest)),
        ("neighbours", of.neighbours(added.neighbours)),
        ("warm start", f"from the experts of {added.copied_from}" if added.copied_from else None),
        ("routing drift", of.drift(manifest)),
        ("frozen", of.proof(manifest)),
    ]
    return Page(
        data=_data(added, data),
        blocks=(title(f"{manifest.name} is added", *_warning(added, data)), facts(rows), of.scores(manifest)),
        hints=(f'Try it: registry compose {manifest.name} --prompt "..."',),
    )


def _warning(added: "AddedDomain", data: list[str]) -> tuple[Part, ...]:
    twin = added.near_duplicate
    return line("\n", Span(_twin_text(twin, data), "warn")) if twin else ()


def _twin_text(twin: "Neighbour", data: list[str]) -> str:
    return (
        f"Its text is nearly that of {twin.name} ({twin.similarity:.2f}). "
        f"To teach {twin.name} this text instead:\n{_retrain_command(twin, data)}"
    )


def _twin_data(twin: "Neighbour", data: list[str]) -> dict[str, object]:
    return {**of.neighbour_record(twin), "instead": _retrain_command(twin, data)}


def _retrain_command(twin: "Neighbour", data: list[str]) -> str:
    given = [word for source in data for word in ("--data", source)] or ["--data", "FILE"]
    return shlex.join(["registry", "retrain", twin.name, *given])


def _data(added: "AddedDomain", data: list[str]) -> dict[str, object]:
    manifest, twin = added.manifest, added.near_duplicate
    return {
        **of.record(manifest),
        "scores": added.scores.as_json(),
        "drift": asdict(added.drift),
        "neighbours": [of.neighbour_record(near) for near in added.neighbours],
        "near_duplicate": _twin_data(twin, data) if twin else None,
        "warm_start": added.copied_from,
        "resumed_from": added.resumed_from,
        "losses": manifest.train["losses"],
        "seconds": manifest.train["seconds"],
        "proof": manifest.proof,
    }
