"""`registry retrain`: the next version of a domain, from new text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...domains.errors import GateFailedError
from ..options import (
    Data,
    Device,
    Dtype,
    Json,
    Reference,
    StorePath,
    TrainingOptions,
    given_options,
    shape_option,
    sources,
    takes_groups,
)
from ..show import facts as of
from ..show import output
from ..show.numbers import bits, exact, percent, plural, size
from ..show.page import Cell, Page, Part, Span, cell, facts, line, title
from ..show.watch import watch
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.learn.retrain import RetrainedDomain
    from ...registry.learn.retrain_plan import RetrainingPlan


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What is different in the new experts; what is not given is as in the parent."""

    rank: Annotated[int | None, shape_option("Rank of each new expert.", min=1, show_default="as the parent")] = None
    experts: Annotated[float | None, shape_option("New experts a layer, on average.", show_default="as the parent")] = (
        None
    )


@takes_groups
def retrain(
    *,
    ref: Reference,
    data: Data = None,
    mode: Annotated[
        Literal["extend", "continue", "fresh"],
        typer.Option(
            metavar="extend|continue|fresh",
            help="Add experts beside the parent's, which stay frozen; train a copy of the parent's; or start over.",
        ),
    ] = "extend",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="N",
            help="Share by which bits per byte may rise on the parent's held-out text.",
            show_default="0.005",
        ),
    ] = None,
    gate_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Judge by this text instead of the parent's held-out text.", show_default=False
        ),
    ] = None,
    shape: ShapeOptions,
    training: TrainingOptions,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Learn new text of a domain as its next version. The parent stays as it is.

    latest moves to the new version if that predicts the parent's held-out text as well as the parent, within the
    tolerance. Otherwise it is stored and held back: exit code 9. A repeated command resumes an interrupted one.

    Example: registry retrain medicine --data new-notes.jsonl
    """
    from ...registry.learn.retrain_plan import plan_retraining

    registry = open_registry(store, device=device, dtype=dtype)
    options = {"mode": mode, "bank": given_options(shape), "gate_data": sources(gate_data), "tolerance": tolerance}
    plan = plan_retraining(registry.store, registry.show(ref), sources(data), **options)
    if not as_json:
        output.hint(plan_text(plan))
    with watch("loading the base model", as_json=as_json) as watching:
        done = registry.retrain(
            ref, data=sources(data), training=training.config(), on_progress=watching.on_progress, **options
        )
    output.show(retrained_page(done), command="retrain", as_json=as_json)
    if not done.acceptance.holds:
        raise held_back(done)


def plan_text(plan: "RetrainingPlan") -> str:
    """What is about to happen."""
    name, record = of.reference(plan.parent), plan.data.record
    text = f"{', '.join(record['files'])}: {plural(record['rows'], 'row')}, {size(record['bytes'])}"
    how = {
        "extend": f"new experts of rank {plan.bank.rank} beside those of {name}, which stay frozen",
        "continue": f"a copy of the experts of {name} is trained further",
        "fresh": f"new experts of rank {plan.bank.rank} in place of those of {name}",
    }
    judged = f"judged by {plural(len(plan.older), 'held-out row')}, tolerance {percent(plan.tolerance, digits=1)}"
    return f"Retraining {name} with {text}\n{how[plan.mode]}; {judged}"


def retrained_page(done: "RetrainedDomain") -> Page:
    """What the retraining brought."""
    manifest, gate = done.manifest, done.acceptance
    verdict = Span("latest moves to it" if gate.holds else "held back", "good" if gate.holds else "bad")
    judged = line(
        f"{bits(gate.parent)} -> {bits(gate.new)} bits per byte on {size(gate.bytes)} of the parent's held-out text, ",
        verdict,
    )
    inherited = manifest.proof.get("inherited")
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(f"{of.reference(manifest)}, {manifest.lineage['mode']} of {of.reference(done.parent)}")),
        ("digest", cell(manifest.digest)),
        ("gate", cell(judged, f"{exact(gate.parent)} {exact(gate.new)} {'holds' if gate.holds else 'held back'}")),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("training", of.training(manifest)),
        ("kept", _kept(inherited) if inherited else None),
        ("resumed", f"from step {done.resumed_from}" if done.resumed_from else None),
        ("loss", of.loss(manifest)),
        ("routing drift", of.drift(manifest)),
        ("frozen", of.proof(manifest)),
    ]
    head = f"{manifest.name} is retrained" if not done.is_repeated else f"{of.reference(manifest)} was stored before"
    hints = (f"Compare them: registry diff {of.reference(done.parent)} {of.reference(manifest)}",)
    return Page(data=_data(done), blocks=(title(head), facts(rows), of.scores(manifest)), hints=hints)


def _kept(inherited: dict[str, Any]) -> Cell:
    text = f"{plural(inherited['experts'], 'expert')} of {inherited['from']}, unchanged"
    return cell(Span(text, "good"), f"{text}, {inherited['digest']}")


def held_back(done: "RetrainedDomain") -> GateFailedError:
    """The error of a version that did not pass."""
    gate, name = done.acceptance, of.reference(done.manifest)
    most, found = percent(gate.tolerance, digits=2), percent(gate.change, digits=2)
    return GateFailedError(
        f"{name} is stored and held back: {done.manifest.name} still means {of.reference(done.parent)}.",
        cause=f"on the parent's held-out text it needs {found} more bits per byte"
        f" ({gate.parent:.4f} -> {gate.new:.4f}), at most {most} are allowed",
        fix=f"accept it anyway: registry alias {name} latest",
    )


def _data(done: "RetrainedDomain") -> dict[str, object]:
    manifest = done.manifest
    return {
        **of.record(manifest),
        "parent": done.parent.version,
        "mode": manifest.lineage["mode"],
        "held_back": not done.acceptance.holds,
        "gate": done.acceptance.as_json(),
        "is_repeated": done.is_repeated,
        "resumed_from": done.resumed_from,
        "scores": manifest.evaluation,
        "losses": manifest.train["losses"],
        "seconds": manifest.train["seconds"],
        "proof": manifest.proof,
    }
