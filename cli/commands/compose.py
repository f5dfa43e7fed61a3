"""`registry compose` and `generate`: putting domains together, and asking the result."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import InputError
from ..options import Device, Dtype, Json, MaxNewTokens, Spec, Static, StorePath
from ..show import facts as of
from ..show import output
from ..show.numbers import brief, exact, percent, plural, short
from ..show.page import Block, Page, Span, Table, Words, cell, facts, faint, line, slot_style, table, title
from ..show.slots import answer_data, answer_line, legend, routed_text, shares
from ..show.watch import watch
from ..startup import open_registry
from .pull import localised

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.compose.generate import Answer
    from ...registry.compose.plan import Plan


def compose(
    spec: Spec,
    static: Static = False,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the composition into a new folder.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Put domains together: show what the composition will be, answer a prompt with it, or save it.

    general, the KP bank, is always there. Weights are the slots' priors, or with --static their fixed shares.

    Example: registry compose medicine+legal
    """
    registry = open_registry(store, device=device, dtype=dtype)
    spec = localised(registry, spec, as_json=as_json)
    plan = planned(registry, spec, static=static)
    saved = registry.save(spec, out, static=static) if out else None
    answer = None
    if prompt is not None:
        with watch("loading the base model", as_json=as_json) as watching:
            model = registry.compose(spec, static=static)
            watching.wait("answering")
            answer = registry.generate(model, prompt, max_new_tokens=max_new_tokens)
    output.show(compose_page(plan, saved=saved, answer=answer), command="compose", as_json=as_json)


def planned(registry: "Registry", spec: str, *, static: bool) -> "Plan":
    """The plan of a composition.

    Raises:
        InputError: It was saved to route, and constant weights are asked for.
    """
    plan = registry.plan(spec, static=static)
    if static and not plan.static:
        raise InputError(
            f"The saved composition {spec} routes.",
            cause="what it does was fixed when it was saved",
            fix=f"leave out --static, or save it anew: registry compose {plan.composition} --static --out DIR",
        )
    return plan


def compose_page(plan: "Plan", *, saved: Path | None, answer: "Answer | None") -> Page:
    """What a composition is."""
    base = plan.slots[0].manifest.base
    checked = line(base.id, ", the same in every slot, ", faint(brief(base.weights)))
    rows = [
        ("composition", cell(str(plan.composition))),
        ("pinned", cell(plan.pinned)),
        ("slot gates", cell("static" if plan.static else "routed")),
        ("experts", of.per_layer(plan.experts_per_layer)),
        ("ranks", of.per_layer(plan.ranks_per_layer)),
        ("parameters", cell(short(plan.parameters), plan.parameters)),
        ("base", cell(checked, f"{base.id} {base.weights}")),
        ("saved", cell(str(saved))) if saved else None,
    ]
    blocks: list[Block] = [facts(rows), _slot_table(plan)]
    if answer:
        blocks += [title("Answer"), Words(answer_line(answer))]
    again = f'Ask it: registry generate {_spec_of(plan, saved)} "..."'
    return Page(data=_data(plan, saved, answer), blocks=tuple(blocks), hints=() if answer else (again,))


def _spec_of(plan: "Plan", saved: Path | None) -> str:
    """What names this composition in a command; a bare name is a domain's, so a folder needs a slash."""
    if saved is None:
        return f"{plan.composition} --static" if plan.static else str(plan.composition)
    return shlex.quote(str(saved) if len(saved.parts) > 1 else f"./{saved}")


def _slot_table(plan: "Plan") -> Table:
    rows = []
    for i, slot in enumerate(plan.slots):
        manifest = slot.manifest
        total = of.parameters(manifest)
        rows.append(
            [
                cell(Span(slot.name, slot_style(i))),
                cell(str(manifest.version)),
                cell(percent(slot.prior, digits=1), exact(slot.prior)),
                cell(str(of.expert_count(manifest))),
                cell(short(total), total),
                of.per_layer(manifest.allocation["counts"]),
            ]
        )
    share = "SHARE" if plan.static else "PRIOR"
    columns = ("SLOT", "VERSION", share, "EXPERTS", "PARAMETERS", "PER LAYER")
    return table(columns, rows, right=("VERSION", share, "EXPERTS", "PARAMETERS"), tight=columns)


def _data(plan: "Plan", saved: Path | None, answer: "Answer | None") -> dict[str, object]:
    slots = [
        {
            "name": slot.name,
            "version": slot.manifest.version,
            "digest": slot.manifest.digest,
            "prior": round(slot.prior, 6),
            "experts_per_layer": list(slot.manifest.allocation["counts"]),
            "parameters": of.parameters(slot.manifest),
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


def generate(
    spec: Spec,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; - or nothing reads it from standard input.",
            show_default=False,
        ),
    ] = None,
    show_route: Annotated[
        bool, typer.Option("--show-route", metavar="", help="Show which slot took each token.")
    ] = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="N", help="0 takes the likeliest token; above, samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="For sampling: same seed, same answer.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", metavar="", help="Put the prompt through the model's chat template.")
    ] = False,
    static: Static = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a composition.

    Example: registry generate medicine+legal "The patient was given" --show-route
    """
    text = _prompt(prompt)
    registry = open_registry(store, device=device, dtype=dtype)
    spec = localised(registry, spec, as_json=as_json)
    plan = planned(registry, spec, static=static)
    if show_route and plan.static:
        raise InputError("A static composition does not route.", fix="leave out --static or --show-route")
    with watch("loading the base model", as_json=as_json) as watching:
        model = registry.compose(spec, static=static)
        watching.wait("answering")
        answer = registry.generate(
            model, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat
        )
    output.show(answer_page(plan, answer, show_route=show_route), command="generate", as_json=as_json)


def answer_page(plan: "Plan", answer: "Answer", *, show_route: bool) -> Page:
    """An answer, with the route it took if that is asked for."""
    data = {"composition": str(plan.composition), "pinned": plan.pinned, **answer_data(answer, with_tokens=show_route)}
    if not show_route:
        return Page(data=data, blocks=(Words(answer_line(answer)),))
    slots = answer.slots
    mean = shares(answer.route, slots, heading="MEAN GATE")
    count = Words(line(faint(plural(answer.new_tokens, "new token"))), in_pipes=False)
    return Page(data=data, blocks=(Words(answer_line(answer)), legend(slots), routed_text(answer), mean, count))


def _prompt(given: str | None) -> str:
    """The prompt, from standard input if it is not given.

    Raises:
        InputError: There is none.
    """
    if given not in (None, "-"):
        return str(given)
    text = "" if given is None and sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise InputError("There is no prompt.", fix='registry generate SPEC "some text", or pipe the text in')
    return text
