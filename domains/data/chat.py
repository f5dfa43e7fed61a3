"""Render a conversation by the chat template, and find the text in it that is to be learned.

Templates move, trim, drop and add text, so no turn is searched for by its content. A template that has
`{% generation %}` blocks says itself what the assistant wrote. For the others the conversation is rendered again with a
marker in place of every content, and the renderings are aligned: the text between the markers is the template's, if it
is the same with other markers, and what stands in place of a marker is that content, exactly or without white space
around it. A template whose own text depends on the contents (Qwen3 takes thoughts out of them) is asked turn by turn:
the prompt before a turn and the conversation up to it must be where they are in the whole.

A turn begins where generation begins, after the generation prompt or its header, and ends with its end token. A row is
refused if a turn cannot be placed, a content is missing or cut, a field makes no difference, or text of others would be
learned.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import jinja2
from transformers import PreTrainedTokenizerBase

from ..errors import CorpusError, InputError
from .example import Example

Turn = dict[str, Any]
Span = tuple[int, int]  # start and end in the rendered text

_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what makes transformers track generation blocks
# what templates raise on values that they do not expect
TEMPLATE_ERRORS: Final = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
_AS_PROMPT: Final = "write the row as prompt and completion"
_PART: Final = "a part, not its text"  # shows that a template writes a part of a content as an object
_RENDERINGS: Final = 3  # of a template that writes the time, until the clock does not change in between


_OTHER: Final = str.maketrans("Qx0123456789", "Kvabcdefghij")  # makes a second marker, alike in no position


@dataclass(frozen=True)
class _Part:
    """A content, or another text of a message, that the template is expected to render."""

    turn: int
    key: str  # content, another field, or `tool_calls[0].function.name`
    text: str
    marker: str

    @property
    def other_marker(self) -> str:
        """A second marker: a template that shows pieces of contents shows other pieces of it."""
        return self.marker.translate(_OTHER)

    @property
    def is_call(self) -> bool:
        """Whether it is the name of a tool that is called; its arguments follow."""
        return self.key.startswith("tool_calls")

    @property
    def is_name(self) -> bool:
        """Whether it names the speaker, which a template writes before a turn."""
        return self.key == "name"


@dataclass(frozen=True)
class _Region:
    """A part, and where it is in the rendered text."""

    part: _Part
    start: int
    end: int


class _RefusedError(Exception):
    """What is wrong with a row; converted to an error that names file and line."""

    def __init__(self, problem: str, cause: str | None = None, fix: str | None = None):
        super().__init__(problem)
        self.problem, self.cause, self.fix = problem, cause, fix


def learned_spans(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, fix: str = _AS_PROMPT
) -> tuple[str, list[Span]]:
    """Return the rendered conversation, and the spans of it that are to be learned, in order.

    Args:
        example: A conversation.
        tokenizer: The base model's tokenizer.
        fix: What helps if the template cannot render it as it is.

    Raises:
        CorpusError: The template cannot render the row, ignores a field of it, or a turn cannot be placed; an
            InputError if the example has no source.
        InputError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "The tokenizer of the base model has no chat template, and the data has conversations.",
            fix="write the data as prompt and completion, or use an instruct version of the base model",
        )
    try:
        return _rendered(example, tokenizer, as_parts=False)
    except _RefusedError as refused:
        # templates of models that see images read contents as lists of parts, some of them only so
        with suppress(_RefusedError):
            return _rendered(example, tokenizer, as_parts=True)
        raise _to_error(example, refused, fix) from refused


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, *, fix: str) -> str:
    """Return a conversation as the assistant reads it before its next turn.

    Args:
        example: A conversation that the assistant is to answer.
        tokenizer: The base model's tokenizer.
        fix: What helps if the template cannot render it as it is.

    Raises:
        InputError: The tokenizer has no chat template, or it cannot render the conversation, ignores a field of it, or
            leaves out a part.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "The tokenizer of the base model has no chat template, and the prompt is a conversation.",
            fix="give the prompt as a text, or use an instruct version of the base model",
        )
    try:
        return _prompt_of(_Chat(example, tokenizer, as_parts=False))
    except _RefusedError as refused:
        with suppress(_RefusedError):
            return _prompt_of(_Chat(example, tokenizer, as_parts=True))
        raise _to_error(example, refused, fix) from refused


def _prompt_of(chat: "_Chat") -> str:
    _check_fields(chat)
    prompt = chat.render(chat.turns, generation_prompt=True)
    marked = chat.render(chat.all_marked, generation_prompt=True)
    if prompt is None:
        raise _RefusedError("the chat template cannot render a prompt of the conversation")
    for part in chat.parts:
        is_left_out = part.marker not in marked if marked else _squashed(part.text) not in _squashed(prompt)
        if is_left_out:
            raise _left_out(chat, part)
    return prompt


def text_before_answer(example: Example, tokenizer: PreTrainedTokenizerBase, *, fix: str) -> str:
    """Return what the chat template writes before the assistant's answer, which is the last of two turns.

    Raises:
        CorpusError: The template cannot render such a conversation; an InputError if the example has no source.
    """
    (user, _), salt = example.messages, 0
    while (marker := f"Qx{salt}xQ") in user[1]:
        salt += 1
    asked = replace(example, messages=(user, ("assistant", marker)))
    whole, ((start, end),) = learned_spans(asked, tokenizer, fix=fix)
    return whole[:start] + whole[start:end].partition(marker)[0]


def _rendered(example: Example, tokenizer: PreTrainedTokenizerBase, *, as_parts: bool) -> tuple[str, list[Span]]:
    for _ in range(_RENDERINGS):
        chat = _Chat(example, tokenizer, as_parts=as_parts)
        refused, spans = None, []
        try:
            spans = _learned_spans(chat)
        except _RefusedError as error:
            refused = error
        if chat.has_changed():  # the clock went on between two renderings
            continue
        if refused is not None:
            raise refused
        return chat.whole, spans
    raise _RefusedError("the chat template renders a conversation differently each time")


def _to_error(example: Example, refused: _RefusedError, otherwise: str) -> InputError:
    problem, cause, fix = refused.problem, refused.cause, refused.fix or otherwise
    if example.source:
        return CorpusError(example.source, problem, line=example.line, cause=cause, fix=fix)
    return InputError(f"{problem[0].upper()}{problem[1:]}.", cause=cause, fix=fix)


def _learned_spans(chat: "_Chat") -> list[Span]:
    _check_fields(chat)
    regions = chat.regions()
    if chat.has_generation_blocks:
        found = _spans_of_blocks(chat, chat.turns, regions)
    elif regions is not None:
        found = {turn: [_span_around(chat, regions, turn)] for turn in chat.assistant_turns}
    else:
        found = _spans_by_prompt(chat, chat.turns, chat.whole)
    if regions is None:
        _check_nothing_is_cut(chat, found)
        _check_nothing_leaks(chat)
    else:
        _check_regions(chat, regions, found)
    spans = [span for turn in chat.assistant_turns for span in found[turn]]
    if any(start < end for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        raise _RefusedError("the chat template renders assistant turns out of their order")
    return [span for turn in chat.assistant_turns if turn in chat.learned for span in found[turn]]


class _Chat:
    """A conversation, and the template that renders it.

    Attributes:
        turns: The messages; the arguments of tool calls have the form that the template shows.
        whole: The rendered conversation.
        implied: Fields that the template may leave out, because the order of the messages says the same.
    """

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase, *, as_parts: bool):
        self.tokenizer: Any = tokenizer
        self.as_parts = as_parts
        self.tools: Any = example.tools
        self.learned = set(example.learned_turns)
        self.implied: set[tuple[int, str]] = set()
        try:
            self.template = str(self.tokenizer.get_chat_template(None, self.tools))
            self.turns, self.whole = self._render_calls(example.turns)
        except TEMPLATE_ERRORS as error:
            raise _RefusedError("the chat template cannot render the conversation", str(error)) from error
        self.assistant_turns = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        self.has_generation_blocks = _GENERATION.search(self.template) is not None

    def has_changed(self) -> bool:
        """Return whether the template writes the time, and renders the same conversation differently by now."""
        return "strftime_now" in self.template and self.render(self.turns) != self.whole

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False, tools: bool = True) -> str | None:
        """Render other turns; None if the template refuses them."""
        try:
            return self._render(turns, generation_prompt=generation_prompt, tools=tools)
        except TEMPLATE_ERRORS:
            return None

    def before(self, turns: Sequence[Turn], turn: int) -> str | None:
        """Render the prompt that the assistant answers with a turn; None for the first turn."""
        return self.render(turns[:turn], generation_prompt=True) or None if turn else None

    def through(self, turns: Sequence[Turn], turn: int) -> str | None:
        """Render the conversation up to a turn, with it."""
        return self.whole if len(turns) == turn + 1 and turns is self.turns else self.render(turns[: turn + 1])

    def blocks(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Render with the spans of the template's generation blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        try:
            rendered: Any = render_jinja_template(
                [self._given(given)],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TEMPLATE_ERRORS as error:
            raise _RefusedError("the chat template cannot render the conversation", str(error)) from error
        (text,), (spans,) = rendered
        return text, [(start, end) for start, end in spans if start < end]

    @cached_property
    def parts(self) -> list[_Part]:
        """The texts of all turns, each with a marker that occurs nowhere else."""
        found = [(i, key, text) for i, turn in enumerate(self.turns) for key, text in _texts(turn)]
        salt = 0
        while any(prefix in self.whole for prefix in (f"Qx{salt}x", f"Qx{salt}x".translate(_OTHER))):
            salt += 1
        parts = [_Part(*item, marker=f"Qx{salt}x{number:05}xQ") for number, item in enumerate(found)]
        return [part for part in parts if (part.turn, part.key) not in self.implied]

    def marked(self, *, keep: Sequence[int] = (), other: bool = False) -> list[Turn]:
        """Return the turns with markers in place of their texts, except the turns in `keep`."""
        turns = list(self.turns)
        for part in self.parts:
            if part.turn not in keep:
                marker = part.other_marker if other else part.marker
                turns[part.turn] = _with_text(turns[part.turn], part.key, marker)
        return turns

    @cached_property
    def all_marked(self) -> list[Turn]:
        """The turns with markers in place of all their texts."""
        return self.marked()

    def regions(self) -> list[_Region] | None:
        """Return where every part is, or None if the template's own text depends on the contents.

        Raises:
            _RefusedError: The template leaves out a part.
        """
        marked, others = self.render(self.all_marked), self.render(self.marked(other=True))
        if marked is None or others is None:
            return None
        by_marker = {part.marker: part for part in self.parts}
        pieces = re.split(f"({'|'.join(by_marker)})", marked)
        shown = [by_marker[marker] for marker in pieces[1::2]]
        for part in self.parts:
            if part not in shown:
                raise _left_out(self, part)
        literals = pieces[0::2]
        if literals != re.split("|".join(part.other_marker for part in self.parts), others):
            return None
        spans = _align(self.whole, literals, [part.text for part in shown])
        if spans is None:
            return None
        return [_Region(part, start, end) for part, (start, end) in zip(shown, spans, strict=True)]

    def _render(self, turns: Sequence[Turn], *, generation_prompt: bool = False, tools: bool = True) -> str:
        options: Any = {"tools": self.tools if tools else None, "add_generation_prompt": generation_prompt}
        given = self._given(turns)
        text = self.tokenizer.apply_chat_template(given, tokenize=False, chat_template=self.template, **options)
        if _PART in text:
            raise ValueError("the chat template renders a part of a content as an object")
        return str(text)

    def _given(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return the turns with contents in the form that the template reads."""
        if not self.as_parts:
            return list(turns)
        contents = [turn.get("content") for turn in turns]
        parts = [
            [{"type": "text", "text": text, "part": _PART}] if isinstance(text, str) else text for text in contents
        ]
        return [turn | {"content": part} for turn, part in zip(turns, parts, strict=True)]

    def _render_calls(self, turns: list[Turn]) -> tuple[list[Turn], str]:
        """Render the arguments of tool calls as objects, or as JSON texts if the template shows those only."""
        calling = next((i for i, turn in enumerate(turns) if turn.get("tool_calls")), None)
        if calling is None:
            return turns, self._render(turns)
        as_objects, as_texts = ([_with_arguments(turn, as_text=flag) for turn in turns] for flag in (False, True))
        for form, as_json in ((as_objects, True), (as_texts, True), (as_objects, False)):
            rendered = self.render(form)
            if rendered is not None and _shows_arguments(form, rendered, as_json=as_json):
                return form, rendered
        self._render(as_objects)
        raise _RefusedError(f"the chat template does not show messages[{calling}].tool_calls with all arguments")


# --- the fields of a row ---


def _check_fields(chat: _Chat) -> None:
    """Raise if a field makes no difference to what the template renders.

    Raises:
        _RefusedError: Names the field.
    """
    if chat.tools and chat.render(chat.turns, tools=False) == chat.whole:
        raise _RefusedError("the chat template ignores the tools of the row", fix="remove the key 'tools'")
    for i, turn in enumerate(chat.turns):
        for key in turn.keys() - {"role", "content"}:
            without = {name: value for name, value in turn.items() if name != key}
            if chat.render([*chat.turns[:i], without, *chat.turns[i + 1 :]]) != chat.whole:
                continue
            if not _is_implied(chat.turns, i, key):
                problem = f"the chat template ignores messages[{i}].{key} ({turn['role']})"
                raise _RefusedError(problem, fix=f"remove the key {key!r}")
            chat.implied.add((i, key))


def _is_implied(turns: Sequence[Turn], i: int, key: str) -> bool:
    """Return whether a tool's message follows the call that it names, so that the order says the same."""
    if turns[i]["role"] != "tool" or key not in ("tool_call_id", "name"):
        return False
    calling = max((j for j in range(i) if turns[j]["role"] != "tool"), default=0)
    calls = turns[calling].get("tool_calls") or []
    number = i - calling - 1
    if number >= len(calls):
        return False
    return turns[i][key] == (calls[number].get("id") if key == "tool_call_id" else _function(calls[number]).get("name"))


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call.get("function", call)


def _texts(turn: Turn) -> Iterator[tuple[str, str]]:
    """Yield the texts of a turn that a template is expected to render as they are."""
    for key, value in turn.items():
        if key not in ("role", "tool_call_id") and isinstance(value, str) and value.strip():
            yield key, value
    for number, call in enumerate(turn.get("tool_calls") or ()):
        yield f"tool_calls[{number}].function.name", _function(call)["name"]


def _with_text(turn: Turn, key: str, text: str) -> Turn:
    if not key.startswith("tool_calls["):
        return turn | {key: text}
    number, calls = int(key[len("tool_calls[") :].partition("]")[0]), list(turn["tool_calls"])
    calls[number] = _with_function(calls[number], name=text)
    return turn | {"tool_calls": calls}


def _with_function(call: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**call, "function": {**call["function"], **changes}} if "function" in call else {**call, **changes}


def _with_arguments(turn: Turn, *, as_text: bool) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        found = _function(call).get("arguments")
        value = _from_json(found)
        if as_text and isinstance(found, Mapping):
            call = _with_function(call, arguments=json.dumps(found, ensure_ascii=False))
        elif not as_text and isinstance(found, str) and isinstance(value, Mapping):
            call = _with_function(call, arguments=value)
        calls.append(call)
    return turn | {"tool_calls": calls}


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _shows_arguments(turns: Sequence[Turn], rendered: str, *, as_json: bool) -> bool:
    """Return whether all arguments of tool calls are in the rendered text, as JSON or one by one."""
    text = _squashed(rendered)
    for turn in turns:
        for call in turn.get("tool_calls") or ():
            value = _from_json(_function(call).get("arguments"))
            if not value:
                continue
            if any(_squashed(json.dumps(value, ensure_ascii=flag)) in text for flag in (False, True)):
                continue
            if as_json or repr(value) in rendered or not all(_is_shown(leaf, text) for leaf in _leaves(value)):
                return False
    return True


def _leaves(value: Any) -> Iterator[Any]:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if items is None:
        yield value
    else:
        for item in items:
            yield from _leaves(item)


def _is_shown(leaf: Any, squashed: str) -> bool:
    return any(_squashed(form) in squashed for form in (str(leaf), json.dumps(leaf, ensure_ascii=False)))


# --- where the turns are ---


def _align(whole: str, literals: Sequence[str], texts: Sequence[str]) -> list[Span] | None:
    """Return where each text is, if `whole` is the literals with the texts in between, as they are or trimmed."""
    if not whole.startswith(literals[0]):
        return None
    # for each number of texts: where the literal after them may end, and how it is reached
    reached: list[dict[int, Span]] = [{len(literals[0]): (0, 0)}]
    for text, literal in zip(texts, literals[1:], strict=True):
        ends: dict[int, Span] = {}
        for start in reached[-1]:
            for form in (text, text.strip(), text.rstrip(), text.lstrip()):
                end = start + len(form)
                if whole.startswith(form, start) and whole.startswith(literal, end):
                    ends.setdefault(end + len(literal), (start, end))
        reached.append(ends)
    position, spans = len(whole), []
    if position not in reached[-1]:
        return None
    for ends in reached[:0:-1]:
        spans.append(ends[position])
        position = ends[position][0]
    return spans[::-1]


def _span_around(chat: _Chat, regions: Sequence[_Region], turn: int) -> Span:
    """Return the span of an assistant turn around its parts, from the end of its prompt through its end token."""
    whole = chat.whole
    own = [region for region in regions if region.part.turn == turn and not region.part.is_name]
    if not own:
        raise _not_placed(chat, turn)
    first, last = own[0], own[-1]
    bounds = [edge for region in regions if region.part.turn != turn for edge in (region.start, region.end)]
    earliest = max((edge for edge in bounds if edge <= first.start), default=0)
    latest = min((edge for edge in bounds if edge >= last.end), default=len(whole))
    start = _start_after_prompt(chat, chat.turns, whole, first, earliest=earliest)
    through = chat.through(chat.turns, turn) or ""
    if start is not None and whole.startswith(through) and last.end <= len(through) <= latest:
        return start, len(through)
    gap, tail = _surroundings(chat, chat.all_marked, first.part, last.part)
    if start is None:
        start = _start_after_gap(chat, chat.turns, whole, first, earliest=earliest, gap=gap)
    if last.part.is_call:
        if not tail or not whole.startswith(tail, last.end):
            raise _not_placed(chat, turn)
        return start, last.end + len(tail)
    return start, last.end + _length_of_end(chat, whole[last.end : latest], tail)


def _start_after_prompt(
    chat: _Chat, turns: Sequence[Turn], whole: str, first: _Region, *, earliest: int = 0
) -> int | None:
    """Return where the prompt before an assistant turn ends; None if the rendered text does not begin with it.

    Args:
        first: The first part of the turn.
        earliest: Where the turn before it ends, if that is known.
    """
    before = chat.before(turns, first.part.turn)
    if before is None or not whole.startswith(before) or not earliest <= len(before) <= first.start:
        return None
    has_header = bool(whole[len(before) : first.start].strip()) and _has_header(chat, turns, first.part, before)
    return first.start if has_header else len(before)


def _start_after_gap(
    chat: _Chat, turns: Sequence[Turn], whole: str, first: _Region, *, earliest: int = 0, gap: str | None
) -> int:
    """Return where an assistant turn begins if the rendered text does not begin with its prompt.

    Args:
        gap: What a conversation that ends with the turn has between prompt and turn.
    """
    if gap is not None and whole.endswith(gap, earliest, first.start):
        has_header = gap.strip() and _has_header(chat, turns, first.part, chat.before(turns, first.part.turn))
        return first.start if has_header else first.start - len(gap)
    if first.part.is_call:
        raise _not_placed(chat, first.part.turn)
    return first.start


def _has_header(chat: _Chat, turns: Sequence[Turn], first: _Part, before: str | None) -> bool:
    """Return whether what is between the earlier turns and an answer is its header: there is no generation prompt."""
    return not first.is_call and before == chat.render(turns[: first.turn])


def _surroundings(chat: _Chat, turns: Sequence[Turn], first: _Part, last: _Part) -> tuple[str | None, str]:
    """Return what a conversation has between prompt and answer, and after the answer if it ends there.

    None stands for a prompt that is not the beginning of the conversation with the answer.
    """
    prompt = chat.before(turns, first.turn) or ""
    ending = chat.render([*turns[: first.turn], chat.all_marked[first.turn]]) or ""
    gap, tail = None, ""
    if prompt and ending.startswith(prompt) and first.marker in ending[len(prompt) :]:
        gap = ending[len(prompt) : ending.index(first.marker, len(prompt))]
    if last.marker in ending:
        tail = ending[ending.rindex(last.marker) + len(last.marker) :]
    return gap, tail


def _length_of_end(chat: _Chat, rest: str, tail: str) -> int:
    """Return how much of the text after a turn ends it: the end token, or what ends the last turn."""
    eos = str(chat.tokenizer.eos_token or "")
    if eos and rest.startswith(eos):
        return len(eos)
    if tail and rest.startswith(tail):
        return len(tail)
    special = [token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.special]
    return max((len(token) for token in special if rest.startswith(token)), default=0)


def _spans_by_prompt(chat: _Chat, turns: list[Turn], whole: str) -> dict[int, list[Span]]:
    """Return the span of each assistant turn of a template whose own text depends on the contents."""
    return {turn: [_span_by_prompt(chat, turns, whole, turn)] for turn in chat.assistant_turns}


def _span_by_prompt(chat: _Chat, turns: list[Turn], whole: str, turn: int) -> Span:
    before, through = chat.before(turns, turn), chat.through(turns, turn)
    if before and through and whole.startswith(through) and through.startswith(before):
        return len(before), len(through)
    own = [part for part in chat.parts if part.turn == turn and not part.is_name]
    marked = chat.render([*turns[:turn], chat.all_marked[turn], *turns[turn + 1 :]]) if own else None
    if marked is None or any(marked.count(part.marker) != 1 for part in own) or own[-1].is_call:
        raise _not_placed(chat, turn)
    start = marked.index(own[0].marker)
    rest = marked[marked.index(own[-1].marker) + len(own[-1].marker) :]
    end = len(whole) - len(rest)
    if start > end or not whole.startswith(marked[:start]) or not whole.endswith(rest):
        raise _not_placed(chat, turn)
    gap, tail = _surroundings(chat, turns, own[0], own[-1])
    first = _Region(own[0], start, end)
    found = _start_after_prompt(chat, turns, whole, first)
    start = _start_after_gap(chat, turns, whole, first, gap=gap) if found is None else found
    return start, end + _length_of_end(chat, rest, tail)


def _spans_of_blocks(chat: _Chat, turns: list[Turn], regions: Sequence[_Region] | None) -> dict[int, list[Span]]:
    """Return the template's own generation blocks, by turn."""
    text, blocks = chat.blocks(turns)
    found: dict[int, list[Span]] = {turn: [] for turn in chat.assistant_turns}
    if regions is None:
        if len(blocks) != len(found):
            cause = f"{len(found)} assistant turns, {len(blocks)} generation blocks"
            raise _RefusedError("the generation blocks of the chat template cannot be told apart", cause)
        return {turn: [block] for turn, block in zip(found, blocks, strict=True)}
    if text != chat.whole:
        raise _RefusedError("the chat template renders a conversation differently each time")
    for start, end in blocks:
        after = next((region for region in regions if region.end > start), None)
        turn = after.part.turn if after and after.part.turn in found else None
        if turn is None or (after and after.start >= end):  # the block has no part: it belongs to what is next to it
            earlier = [region.part.turn for region in regions if region.end <= start]
            turn = turn if turn is not None else (earlier or [-1])[-1]
        if turn not in found:
            raise _RefusedError("the chat template marks text as the assistant's that belongs to no assistant turn")
        found[turn].append((start, end))
    return found


# --- that nothing is missing, cut, or learned from others ---


def _check_regions(chat: _Chat, regions: Sequence[_Region], found: Mapping[int, Sequence[Span]]) -> None:
    """Raise if a part of an assistant turn is not in its spans, or a part of another turn is.

    A template with generation blocks decides itself whether a reasoning is learned.
    """
    for region in regions:
        part = region.part
        own = found.get(part.turn, ())
        is_inside = any(start <= region.start and region.end <= end for start, end in own)
        may_be_outside = part.is_name or (chat.has_generation_blocks and part.key != "content" and not part.is_call)
        if part.turn in found and not is_inside and not may_be_outside:
            raise _not_placed(chat, part.turn, part.key)
        for turn, spans in found.items():
            if turn != part.turn and any(start < region.end and region.start < end for start, end in spans):
                raise _RefusedError(
                    f"the chat template renders messages[{part.turn}] inside of messages[{turn}] (assistant)",
                    f"the text {_short(part.text)} would be learned",
                )


def _check_nothing_is_cut(chat: _Chat, found: Mapping[int, Sequence[Span]]) -> None:
    """Raise if a text of the conversation is not in what the template rendered, but for white space."""
    whole = _squashed(chat.whole)
    for part in chat.parts:
        is_learned = part.turn in found and not part.is_name
        spans = found[part.turn] if is_learned else ()
        if _squashed(part.text) not in (_squashed("".join(chat.whole[a:b] for a, b in spans)) if is_learned else whole):
            raise _left_out(chat, part)


def _check_nothing_leaks(chat: _Chat) -> None:
    """Raise if what is learned depends on the texts of others: it must be the same for any of them."""
    first, second = (_learned_of(chat, chat.marked(keep=chat.assistant_turns, other=flag)) for flag in (False, True))
    if first != second or any(part.marker in first for part in chat.parts):
        raise _RefusedError("the chat template renders text of others inside of an assistant turn")


def _learned_of(chat: _Chat, turns: list[Turn]) -> str:
    if chat.has_generation_blocks:
        whole, _ = chat.blocks(turns)
        found = _spans_of_blocks(chat, turns, None)
    else:
        whole = chat.render(turns)
        if whole is None:
            raise _not_placed(chat, chat.assistant_turns[0])
        found = _spans_by_prompt(chat, turns, whole)
    return "".join(whole[start:end] for spans in found.values() for start, end in spans)


def _left_out(chat: _Chat, part: _Part) -> _RefusedError:
    what = f"messages[{part.turn}]" + ("" if part.key == "content" else f".{part.key}")
    role = chat.turns[part.turn]["role"]
    return _RefusedError(
        f"the chat template leaves out {what} ({role}), or a part of it", f"the text {_short(part.text)}"
    )


def _not_placed(chat: _Chat, turn: int, key: str = "content") -> _RefusedError:
    what = f"messages[{turn}]" + ("" if key == "content" else f".{key}")
    text = str(chat.turns[turn].get("content") or "")
    return _RefusedError(
        f"it cannot be told where the chat template renders {what} (assistant)", f"the text {_short(text)}"
    )


def _squashed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
