"""`registry retrain`: the next version of a domain, trained on new text."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...domains.data.corpus import as_sources
from ...domains.errors import GateFailedError
from ..options import (
    Data,
    Device,
    Dtype,
    Json,
    RawRows,
    Reference,
    StorePath,
    Strict,
    TrainingOptions,
    expand_option_groups,
    given_options,
    shape_option,
)
from ..show import facts, output
from ..show.numbers import bits, exact, percent, plural, size
from ..show.page import Cell, Page, Part, Span, cell, fields, line, title
from ..show.progress import show_progress
from ..startup import open_registry
from .add_domain import warn_of_probe

if TYPE_CHECKING:
    from ...registry.learn.retrain import RetrainedDomain
    from ...registry.learn.retrain_plan import RetrainingPlan


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Settings of the new experts that differ from the parent's."""

    rank: Annotated[int | None, shape_option("Rank of each new expert.", min=1, show_default="the parent's")] = None
    experts: Annotated[
        float | None, shape_option("New experts per layer, on average.", show_default="the parent's")
    ] = None


@expand_option_groups
def retrain(
    *,
    ref: Reference,
    data: Data = None,
    raw: RawRows = False,
    mode: Annotated[
        Literal["extend", "continue", "fresh"],
        typer.Option(
            metavar="extend|continue|fresh",
            help="extend adds experts beside the parent's, which stay frozen; continue trains a copy of the parent's; "
            "fresh trains new ones only.",
        ),
    ] = "extend",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="N",
            help="Maximum relative increase in bits per byte on the parent's held-out text.",
            show_default="0.005",
        ),
    ] = None,
    gate_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text for the acceptance check, instead of the parent's held-out text.",
            show_default=False,
        ),
    ] = None,
    shape: ShapeOptions,
    training: TrainingOptions,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Retrain a domain on new text: train its next version. The parent version is unchanged.

    The acceptance check compares both on the parent's held-out text: within the tolerance, latest moves to the new
    version; otherwise the new version is stored but held back (exit code 9). Repeat an interrupted command to resume.

    Before training, the routing of everyday questions and of older domains' text is probed as in add-domain; with
    --strict, a version that takes them is not trained (exit code 9).

    Example: registry retrain medicine --data new-notes.jsonl
    """
    from ...registry.learn.retrain_plan import plan_retraining

    registry = open_registry(store, device=device, dtype=dtype)
    options = {"mode": mode, "raw": raw, "bank": given_options(shape), "tolerance": tolerance}
    plan = plan_retraining(
        registry.store, registry.show(ref), as_sources(data), gate_data=as_sources(gate_data), **options
    )
    if not as_json:
        output.hint(plan_text(plan))
    with show_progress("loading the base model", as_json=as_json) as progress:
        done = registry.retrain(
            ref,
            data=data,
            gate_data=gate_data,
            training=training.config(),
            strict=strict,
            on_probe=lambda probe: warn_of_probe(probe, progress, as_json=as_json),
            on_progress=progress.on_progress,
            **options,
        )
    output.show(retrained_page(done), command="retrain", as_json=as_json)
    if not done.acceptance.holds:
        raise held_back(done)


def plan_text(plan: "RetrainingPlan") -> str:
    """Describe what is about to be trained."""
    name, record = facts.reference(plan.parent), plan.data.record
    text = f"{', '.join(record['files'])}: {plural(record['rows'], 'row')}, {size(record['bytes'])}"
    how = {
        "extend": f"new experts of rank {plan.bank.rank} beside those of {name}, which stay frozen",
        "continue": f"a copy of the experts of {name}, trained further",
        "fresh": f"new experts of rank {plan.bank.rank} in place of those of {name}",
    }
    check = (
        f"acceptance check on {plural(len(plan.older), 'held-out row')}, tolerance {percent(plan.tolerance, digits=1)}"
    )
    return "\n".join([f"Retraining {name} with {text}\n{how[plan.mode]}; {check}", *facts.warnings(record["problems"])])


def retrained_page(done: "RetrainedDomain") -> Page:
    """Make the page about a new version."""
    manifest, check = done.manifest, done.acceptance
    verdict = Span("latest moves to it" if check.holds else "held back", "good" if check.holds else "bad")
    scores = f"{bits(check.parent)} -> {bits(check.new)} bits per byte"
    judged = line(f"{scores} on {size(check.bytes)} of the parent's held-out text, ", verdict)
    inherited = manifest.proof.get("inherited")
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(f"{facts.reference(manifest)}, {manifest.lineage['mode']} of {facts.reference(done.parent)}")),
        ("digest", cell(manifest.digest)),
        (
            "acceptance check",
            cell(judged, f"{exact(check.parent)} {exact(check.new)} {'holds' if check.holds else 'held back'}"),
        ),
        ("kinds", f"{len(check.kinds)} judged, {len(check.failing) or 'none'} worse" if check.kinds else None),
        ("experts", facts.experts(manifest)),
        ("per layer", facts.per_layer(manifest.allocation["counts"])),
        ("training", facts.training(manifest)),
        ("inherited", _inherited(inherited) if inherited else None),
        ("resumed", f"from step {done.resumed_from}" if done.resumed_from else None),
        ("loss", facts.loss(manifest)),
        ("validation", facts.validation(manifest)),
        ("held out", facts.held_out(manifest)),
        ("routing drift", facts.drift(manifest)),
        ("everyday chat", facts.chat(manifest)),
        ("frozen", facts.proof(manifest)),
    ]
    head = (
        f"{manifest.name} was retrained" if not done.is_repeated else f"{facts.reference(manifest)} was stored before"
    )
    hints = (f"Compare them: registry diff {facts.reference(done.parent)} {facts.reference(manifest)}",)
    failing = facts.failing_kinds(check)
    blocks = (title(head), fields(rows), *failing, facts.scores(manifest), *facts.probe_warning(done.probe))
    return Page(data=_data(done), blocks=blocks, hints=hints)


def _inherited(inherited: dict[str, Any]) -> Cell:
    text = f"{plural(inherited['experts'], 'expert')} of {inherited['from']}, unchanged"
    return cell(Span(text, "good"), f"{text}, {inherited['digest']}")


def held_back(done: "RetrainedDomain") -> GateFailedError:
    """Make the error of a version that did not pass the acceptance check."""
    check, name = done.acceptance, facts.reference(done.manifest)
    limit, found = percent(check.tolerance, digits=2), percent(check.change, digits=2)
    causes = [f"bits per byte on the parent's held-out text rose by {found} ({check.parent:.4f} -> {check.new:.4f})"]
    if check.new <= check.parent * (1 + check.tolerance):
        causes = []
    causes += [
        f"on its kind {kind.kind!r} they rose by {percent(kind.change, digits=2)} "
        f"({kind.before:.4f} -> {kind.now:.4f}, {plural(kind.rows, 'row')})"
        for kind in check.failing
    ]
    return GateFailedError(
        f"{name} was stored but held back: {done.manifest.name} still means {facts.reference(done.parent)}.",
        cause=f"{'; '.join(causes)}; the tolerance is {limit}",
        fix=f"accept it anyway: registry alias {name} latest",
    )


def _data(done: "RetrainedDomain") -> dict[str, object]:
    manifest = done.manifest
    return {
        **facts.record(manifest),
        "parent": done.parent.version,
        "mode": manifest.lineage["mode"],
        "held_back": not done.acceptance.holds,
        "gate": done.acceptance.as_json(),
        "failing_kinds": [asdict(one) for one in done.acceptance.portraits],
        "chat_probe": done.probe.as_json(),
        "is_repeated": done.is_repeated,
        "resumed_from": done.resumed_from,
        "scores": manifest.evaluation,
        "losses": manifest.train["losses"],
        "held_out": facts.held_out_record(manifest),
        "seconds": manifest.train["seconds"],
        "proof": manifest.proof,
    }
