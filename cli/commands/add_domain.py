"""`registry add-domain`: new experts for a domain, with everything older frozen."""

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...adapters.allocation import allocate
from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig
from ...domains.data.corpus import as_sources
from ..options import (
    BankOptions,
    Data,
    Device,
    Dtype,
    Json,
    RawRows,
    StorePath,
    Strict,
    TrainingOptions,
    expand_option_groups,
)
from ..show import facts, output
from ..show.charts import layers
from ..show.numbers import plural, size
from ..show.page import Cell, Page, Part, Span, cell, fields, line, title
from ..show.progress import ProgressDisplay, show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...domains.statistics.prototypes import Neighbour
    from ...registry import Registry
    from ...registry.learn.add_domain import AddedDomain
    from ...registry.learn.chat_probe import ChatProbe

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A built-in domain, or any name with --data.", show_default=False)
]


@expand_option_groups
def add_domain(
    *,
    name: Name,
    data: Data = None,
    raw: RawRows = False,
    bank: BankOptions,
    training: TrainingOptions,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Add a domain: train new experts for it, and prove that everything older is unchanged.

    medicine, legal, finance and code have bundled sample corpora and need no --data. Repeat an interrupted command to
    resume it from its last checkpoint.

    Before training, everyday questions and older domains' text are routed with and without the domain. One that takes
    more than 5 % of them, or the bare chat template, gives a warning; with --strict nothing is trained (exit code 9).

    Example: registry add-domain medicine
    """
    registry = open_registry(store, device=device, dtype=dtype)
    shape = bank.config()
    plan = plan_addition(registry, name, data, shape, steps=training.steps)
    if not as_json:
        output.hint(str(plan))
    with show_progress("loading the base model", as_json=as_json) as progress:
        added = registry.add_domain(
            name,
            data=data,
            raw=raw,
            bank=shape,
            training=training.config(),
            on_neighbours=lambda found: warn_of_neighbours(found, progress, data or [], as_json=as_json),
            on_probe=lambda probe: warn_of_probe(probe, progress, as_json=as_json),
            strict=strict,
            on_progress=progress.on_progress,
        )
    output.show(added_page(added, data or []), command="add-domain", as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class AdditionPlan:
    """What `add-domain` is about to train, known before anything heavy is loaded."""

    name: str
    files: tuple[str, ...]
    rows: int
    bytes: int
    experts: int  # over all decoder layers
    by_layer: str
    rank: int
    steps: str
    problems: tuple[str, ...] = ()  # of the data

    def __str__(self) -> str:
        text = f"{', '.join(self.files)}: {plural(self.rows, 'row')}, {size(self.bytes)}"
        experts = f"{plural(self.experts, 'expert')} of rank {self.rank}, by layer {self.by_layer}"
        plan = f"Adding {self.name} from {text}\n{experts}, {self.steps}; everything older stays frozen"
        return "\n".join([plan, *facts.warnings(self.problems)])


def plan_addition(
    registry: "Registry", name: str, data: list[str] | None, bank: BankConfig, *, steps: int | None
) -> AdditionPlan:
    """Check name, data and bank, and count rows and experts.

    Raises:
        LoraryError: Name, data or bank is invalid, or there is no KP bank yet.
    """
    from ...registry.measure.held_out import check_new_name, read_domain_data, spec_of

    check_new_name(registry.store, name)
    depth = len(registry.plan(GENERAL).experts_per_layer)
    is_measured = bank.schedule == "data"
    schedule = "uniform" if is_measured else bank.schedule  # the total is always the same
    counts = allocate(depth, experts=bank.experts, schedule=schedule, expert_free=bank.expert_free)
    sources = as_sources(data)
    found = read_domain_data(spec_of(name, sources), sources).record
    return AdditionPlan(
        name=name,
        files=tuple(found["files"]),
        rows=found["rows"],
        bytes=found["bytes"],
        experts=sum(counts),
        by_layer="as measured on the data" if is_measured else layers(counts),
        rank=bank.rank,
        steps=plural(steps, "step") if steps else "as many steps as --epochs needs",
        problems=tuple(found["problems"]),
    )


def warn_of_neighbours(found: "list[Neighbour]", progress: ProgressDisplay, data: list[str], *, as_json: bool) -> None:
    """Warn before training if a stored domain has nearly the same text."""
    record = duplicate_record(found, data)
    if record and as_json:
        output.write_json_line({"near_duplicate": record})
    elif record:
        progress.log(_duplicate_text(record))


def warn_of_probe(probe: "ChatProbe", progress: ProgressDisplay, *, as_json: bool) -> None:
    """Warn before training if the domain will take chat or older domains' text."""
    if not probe.holds and as_json:
        output.write_json_line({"chat_probe": probe.as_json()})
    for problem in probe.problems:
        progress.log(f"Warning: {problem}.")


def added_page(added: "AddedDomain", data: list[str]) -> Page:
    """Make the page about a new domain; `data` is --data as it was given."""
    manifest = added.manifest
    rows: list[tuple[str, Cell | Part | None]] = [
        ("version", cell(facts.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", facts.experts(manifest)),
        ("per layer", facts.per_layer(manifest.allocation["counts"])),
        ("training", facts.training(manifest)),
        ("resumed", f"from step {added.resumed_from}" if added.resumed_from else None),
        ("loss", facts.loss(manifest)),
        ("validation", facts.validation(manifest)),
        ("held out", facts.held_out(manifest)),
        ("neighbours", facts.neighbours(added.neighbours)),
        ("warm start", f"from the experts of {added.copied_from}" if added.copied_from else None),
        ("routing drift", facts.drift(manifest)),
        ("everyday chat", facts.chat(manifest)),
        ("frozen", facts.proof(manifest)),
    ]
    return Page(
        data=_data(added, data),
        blocks=(
            title(f"{manifest.name} was added", *duplicate_warning(added.neighbours, data)),
            fields(rows),
            facts.scores(manifest),
            *facts.probe_warning(added.probe),
        ),
        hints=(f'Try it: registry compose {manifest.name} --prompt "..."',),
    )


def duplicate_warning(found: "list[Neighbour]", data: list[str]) -> tuple[Part, ...]:
    """Return what a heading adds about a stored domain with nearly the same text, if there is one."""
    record = duplicate_record(found, data)
    return line("\n", Span(_duplicate_text(record), "warn")) if record else ()


def duplicate_record(found: "list[Neighbour]", data: list[str]) -> dict[str, Any] | None:
    """Return the stored domain with nearly the same text for --json, with the command that retrains it; else None."""
    from ...domains.statistics.prototypes import find_near_duplicate

    duplicate = find_near_duplicate(found)
    return duplicate and {**facts.neighbour_record(duplicate), "instead": _retrain_command(duplicate, data)}


def _duplicate_text(record: dict[str, Any]) -> str:
    return (
        f"Its text is nearly the same as that of {record['name']} (similarity {record['similarity']:.2f}). "
        f"To retrain {record['name']} on it instead:\n{record['instead']}"
    )


def _retrain_command(duplicate: "Neighbour", data: list[str]) -> str:
    given = [word for source in data for word in ("--data", source)] or ["--data", "FILE"]
    return shlex.join(["registry", "retrain", duplicate.name, *given])


def _data(added: "AddedDomain", data: list[str]) -> dict[str, object]:
    manifest = added.manifest
    return {
        **facts.record(manifest),
        "scores": added.scores.as_json(),
        "drift": asdict(added.drift),
        "chat_probe": added.probe.as_json(),
        "neighbours": [facts.neighbour_record(near) for near in added.neighbours],
        "near_duplicate": duplicate_record(added.neighbours, data),
        "warm_start": added.copied_from,
        "resumed_from": added.resumed_from,
        "losses": manifest.train["losses"],
        "held_out": facts.held_out_record(manifest),
        "seconds": manifest.train["seconds"],
        "proof": manifest.proof,
    }
