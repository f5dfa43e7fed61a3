"""`registry generate`: answer a prompt with a composition."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ...domains.errors import InputError
from ..options import (
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Raw,
    Seed,
    Spec,
    Static,
    Stop,
    StorePath,
    Temperature,
    TopK,
    TopP,
)
from ..show import output
from ..show.numbers import plural
from ..show.page import Page, Paragraph, faint, line
from ..show.progress import show_progress
from ..show.slots import answer_data, answer_hints, answer_line, legend, routed_text, shares
from ..startup import open_registry
from .compose import plan_composition
from .pull import pull_named_packs

if TYPE_CHECKING:
    from ...registry.compose.generate import Answer
    from ...registry.compose.plan import Plan


def generate(
    spec: Spec,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The prompt; if it is - or missing, it is read from standard input.",
            show_default=False,
        ),
    ] = None,
    show_route: Annotated[bool, typer.Option("--show-route", metavar="", help="Show the slot of each token.")] = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    stop: Stop = None,
    seed: Seed = 0,
    raw: Raw = False,
    chat: Annotated[bool, typer.Option("--chat", hidden=True)] = False,
    static: Static = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a composition; it is a user's turn if the base model has a chat template.

    Example: registry generate medicine+legal "What is anaemia?" --show-route
    """
    text = _read_prompt(prompt)
    if chat and raw:
        raise InputError("--chat and --raw exclude each other.", fix="leave out --chat, which is the default")
    registry = open_registry(store, device=device, dtype=dtype)
    if chat and registry.base_record.chat_template is None:
        raise InputError("The tokenizer of the base model has no chat template.", fix="leave out --chat")
    spec = pull_named_packs(registry, spec, as_json=as_json)
    plan = plan_composition(registry, spec, static=static)
    if show_route and plan.static:
        raise InputError("A static composition does not route.", fix="leave out --static or --show-route")
    with show_progress("loading the base model", as_json=as_json) as progress:
        model = registry.compose(spec, static=static)
        progress.start("generating")
        answer = registry.generate(
            model,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop or (),
            seed=seed,
            raw=raw,
        )
    output.show(answer_page(plan, answer, show_route=show_route), command="generate", as_json=as_json)


def answer_page(plan: "Plan", answer: "Answer", *, show_route: bool) -> Page:
    """Make the page of an answer, with its route if that is asked for."""
    data = {"composition": str(plan.composition), "pinned": plan.pinned, **answer_data(answer, with_tokens=show_route)}
    hints = answer_hints(answer)
    if not show_route:
        return Page(data=data, blocks=(Paragraph(answer_line(answer)),), hints=hints)
    slots = answer.slots
    mean = shares(answer.route, slots, heading="MEAN GATE")
    count = Paragraph(line(faint(plural(answer.new_tokens, "new token"))), in_pipes=False)
    blocks = (Paragraph(answer_line(answer)), legend(slots), routed_text(answer.tokens), mean, count)
    return Page(data=data, blocks=blocks, hints=hints)


def _read_prompt(given: str | None) -> str:
    """Return the prompt; read it from standard input if it is not given.

    Raises:
        InputError: There is none.
    """
    if given not in (None, "-"):
        return str(given)
    text = "" if given is None and sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise InputError("There is no prompt.", fix='registry generate SPEC "some text", or pipe the text in')
    return text
