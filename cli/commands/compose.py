"""`registry compose`: show, save or ask a composition of domains."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import InputError
from ..options import Device, Dtype, Json, MaxNewTokens, Raw, Spec, Static, StorePath
from ..show import facts, output
from ..show.numbers import brief, exact, percent, short
from ..show.page import Block, Page, Paragraph, Span, Table, cell, faint, fields, line, slot_style, table, title
from ..show.progress import show_progress
from ..show.slots import answer_data, answer_hints, answer_line
from ..startup import open_registry
from .pull import pull_named_packs

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.compose.generate import Answer
    from ...registry.compose.plan import Plan


def compose(
    spec: Spec,
    static: Static = False,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="A prompt to answer.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the composition to a new folder.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    raw: Raw = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Compose domains into one model: show the plan, answer a prompt, or save the composition.

    The knowledge-preservation (KP) bank, the shared general expert, is part of every composition. Weights are the prior
    of each slot; with --static they are its fixed share.

    Example: registry compose medicine+legal
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = pull_named_packs(registry, spec, as_json=as_json)
    plan = plan_composition(registry, spec, static=static)
    saved = registry.save(spec, out, static=static) if out else None
    answer = None
    if prompt is not None:
        with show_progress("loading the base model", as_json=as_json) as progress:
            model = registry.compose(spec, static=static)
            progress.start("generating")
            answer = registry.generate(model, prompt, max_new_tokens=max_new_tokens, raw=raw)
    output.show(compose_page(plan, saved=saved, answer=answer), command="compose", as_json=as_json)


def plan_composition(registry: "Registry", spec: str, *, static: bool) -> "Plan":
    """Return the plan of a composition.

    Raises:
        InputError: `static` is asked of a composition that was saved with routing.
    """
    plan = registry.plan(spec, static=static)
    if static and not plan.static:
        raise InputError(
            f"The saved composition {spec} is routed, not static.",
            cause="routing or static is chosen when a composition is saved",
            fix=f"leave out --static, or save it again: registry compose {plan.composition} --static --out DIR",
        )
    return plan


def compose_page(plan: "Plan", *, saved: Path | None, answer: "Answer | None") -> Page:
    """Make the page about a composition."""
    base = plan.slots[0].manifest.base
    checked = line(base.id, ", the same in every slot, ", faint(brief(base.weights)))
    rows = [
        ("composition", cell(str(plan.composition))),
        ("pinned", cell(plan.pinned)),
        ("slot gates", cell("static" if plan.static else "routed")),
        ("experts", facts.per_layer(plan.experts_per_layer)),
        ("ranks", facts.per_layer(plan.ranks_per_layer)),
        ("parameters", cell(short(plan.parameters), plan.parameters)),
        ("base", cell(checked, f"{base.id} {base.weights}")),
        ("saved", cell(str(saved))) if saved else None,
    ]
    blocks: list[Block] = [fields(rows), _slot_table(plan)]
    if answer:
        blocks += [title("Answer"), Paragraph(answer_line(answer))]
    hint = f'Ask it: registry generate {_spec_of(plan, saved)} "..."'
    return Page(
        data=_data(plan, saved, answer), blocks=tuple(blocks), hints=answer_hints(answer) if answer else (hint,)
    )


def _spec_of(plan: "Plan", saved: Path | None) -> str:
    """Return how a command names this composition; a folder needs a slash, because a bare name is a domain's."""
    if saved is None:
        return f"{plan.composition} --static" if plan.static else str(plan.composition)
    return shlex.quote(str(saved) if len(saved.parts) > 1 else f"./{saved}")


def _slot_table(plan: "Plan") -> Table:
    rows = []
    for i, slot in enumerate(plan.slots):
        manifest = slot.manifest
        total = facts.parameters(manifest)
        rows.append(
            [
                cell(Span(slot.name, slot_style(i))),
                cell(str(manifest.version)),
                cell(percent(slot.prior, digits=1), exact(slot.prior)),
                cell(str(facts.expert_count(manifest))),
                cell(short(total), total),
                facts.per_layer(manifest.allocation["counts"]),
            ]
        )
    share = "SHARE" if plan.static else "PRIOR"
    columns = ("SLOT", "VERSION", share, "EXPERTS", "PARAMETERS", "PER LAYER")
    return table(columns, rows, right=("VERSION", share, "EXPERTS", "PARAMETERS"), no_wrap=columns)


def _data(plan: "Plan", saved: Path | None, answer: "Answer | None") -> dict[str, object]:
    slots = [
        {
            "name": slot.name,
            "version": slot.manifest.version,
            "digest": slot.manifest.digest,
            "prior": round(slot.prior, 6),
            "experts_per_layer": list(slot.manifest.allocation["counts"]),
            "parameters": facts.parameters(slot.manifest),
        }
        for slot in plan.slots
    ]
    base = plan.slots[0].manifest.base
    return {
        "composition": str(plan.composition),
        "pinned": plan.pinned,
        "static": plan.static,
        "slots": slots,
        "experts_per_layer": list(plan.experts_per_layer),
        "ranks_per_layer": list(plan.ranks_per_layer),
        "parameters": plan.parameters,
        "base": {"id": base.id, "revision": base.revision, "weights": base.weights},
        "saved_to": None if saved is None else str(saved),
        "answer": None if answer is None else answer_data(answer),
    }
