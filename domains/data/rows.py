"""Convert rows, objects with one of the known sets of keys, to examples.

    {"text": ...}
    {"prompt": ..., "completion": ..., "choices": [...]}                choices are optional
    {"messages": [{"role": "user", "content": ...}, ...]}
    {"prompt": [{"role": ...}, ...], "completion": [...]}               TRL: what to learn is in the completion
    {"instruction": ..., "input": ..., "output": ...}                   Alpaca; input and system are optional
    {"conversations": [{"from": "human", "value": ...}, ...]}           ShareGPT; system is optional

The first form whose keys are all present and not empty is used, in this order; other keys are ignored, except those
that would change what is learned: they are used or refused. `id`, a string or an integer, is kept as a label. A null
value counts as missing. Text is not changed; it must be UTF-8 without NUL.

Rows that name the same `doc`, `document`, `doc_id`, `document_id` or `group` (the first that is there) are of one
document, and stay on one side of a split (documents.py).

Messages may have `weight` 0 or 1 or `train` true or false; every other field (tool_calls, reasoning_content, name, ...)
is given to the chat template, and the row is refused in tokenization if the template ignores it (chat.py). So are the
`tools` of a row. Content is a string, a list of text parts, or null in a message that calls tools.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CorpusError
from .example import Example

ACCEPTED_KEYS = "text | prompt, completion[, choices] | messages | instruction, output[, input] | conversations"
MAX_KIND = 64  # characters of the name of a kind
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_DOCUMENT_KEYS = ("doc", "document", "doc_id", "document_id", "group")
# keys of a row that would change what is learned, by form
_UNUSED_IN_CHAT = (
    *("functions", "function_call", "tool_choice", "documents", "chat_template", "chat_template_kwargs"),
    *("weight", "train", "images", "image", "videos", "video", "audios", "audio"),
)
_UNUSED_IN_TEXT = ("system", "tools", "functions", "history", "images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Row:
    """Parsed row and its position."""

    line: int  # from 1; for data without lines, the number of the row
    value: object


class BadRowError(ValueError):
    """Problem of a row; converted to a CorpusError once file and line are known."""


def to_example(row: Row, source: str) -> Example:
    """Return the example that a row describes.

    Raises:
        CorpusError: The row is not an object, has no known keys, or a value cannot be used.
    """
    try:
        document, kind = _document(row.value), _row_kind(row.value)
        return replace(_to_example(row.value), document=document, kind=kind, source=source, line=row.line)
    except BadRowError as error:
        raise CorpusError(source, str(error), line=row.line) from error


def _to_example(value: object) -> Example:
    if not isinstance(value, Mapping):
        raise BadRowError(f"expected an object, found {_kind(value)}")
    present = {key: item for key, item in value.items() if item is not None}
    full = {key for key, item in present.items() if item not in ("", [])}
    for keys_there in (full, present.keys()):
        for keys, build in _FORMS.items():
            if keys_there >= set(keys):
                return build(present, _label(present))
    found = ", ".join(repr(str(key)) for key in present) or "no keys"
    raise BadRowError(f"no known keys: found {found[:200]}; accepted are {ACCEPTED_KEYS}")


def _from_text(row: Mapping[str, Any], label: str) -> Example:
    return Example(completion=_text(row, "text"), id=label)


def _from_prompt(row: Mapping[str, Any], label: str) -> Example:
    if isinstance(row["prompt"], list | tuple) or isinstance(row["completion"], list | tuple):
        return _from_prompt_messages(row, label)
    _refuse_unused(row, _UNUSED_IN_TEXT, "a prompt with a completion", "write it into the prompt, or give messages")
    completion = _text(row, "completion")
    choices = _choices(row.get("choices"))
    if choices and completion not in choices:
        raise BadRowError(f"'completion' {_shown(completion)} is not among the choices")
    return Example(_text(row, "prompt", may_be_empty=True), completion, choices, label)


def _from_prompt_messages(row: Mapping[str, Any], label: str) -> Example:
    """Return the conversation of TRL's prompt and completion; the prompt is not learned."""
    kinds = {key: _kind(row[key]) for key in ("prompt", "completion")}
    if not all(isinstance(row[key], list | tuple) for key in kinds):
        raise BadRowError(f"'prompt' is {kinds['prompt']} and 'completion' {kinds['completion']}, expected both alike")
    if _is_given(row.get("choices")):
        raise BadRowError("'choices' cannot be given with a list of messages")
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    return _conversation(row, [replace(turn, is_learned=False) for turn in prompt] + completion, label, "completion")


def _from_alpaca(row: Mapping[str, Any], label: str) -> Example:
    unused = tuple(key for key in _UNUSED_IN_TEXT if key != "system")
    _refuse_unused(row, unused, "an instruction with an output", "give messages instead")
    prompt = _text(row, "system") + "\n\n" if _is_given(row.get("system")) else ""
    prompt += _text(row, "instruction") + "\n\n"
    if row.get("input", "") != "":
        prompt += _text(row, "input") + "\n\n"
    return Example(prompt, _text(row, "output"), id=label)


def _from_messages(row: Mapping[str, Any], label: str) -> Example:
    return _conversation(row, _messages(row, "messages"), label, "messages")


def _from_sharegpt(row: Mapping[str, Any], label: str) -> Example:
    return _conversation(row, _messages(row, "conversations"), label, "conversations")


_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Example]] = {
    ("text",): _from_text,
    ("prompt", "completion"): _from_prompt,
    ("messages",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    ("conversations",): _from_sharegpt,
}


@dataclass(frozen=True)
class _Turn:
    """One message; `fields` are those beside role and content."""

    role: str
    content: str
    fields: Mapping[str, Any]
    is_learned: bool


def _conversation(row: Mapping[str, Any], turns: list[_Turn], label: str, key: str) -> Example:
    _refuse_unused(row, _UNUSED_IN_CHAT, "a conversation", "remove it")
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRowError(f"{key!r} has no assistant message, so there is nothing to learn")
    if not any(turn.is_learned for turn in turns):
        raise BadRowError(f"{key!r} has no assistant message that is to be learned")
    if _is_given(row.get("system")):
        if turns[0].role == "system":
            raise BadRowError(f"has a key 'system', and {key!r} begins with a system message")
        turns = [_Turn("system", _text(row, "system"), {}, is_learned=False), *turns]
    more: dict[str, Any] = {}
    if tools := _tools(row.get("tools")):
        more["tools"] = tools
    if any(turn.fields for turn in turns):
        more["fields"] = [dict(sorted(turn.fields.items())) for turn in turns]
    if untrained := [i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.is_learned]:
        more["untrained"] = untrained
    messages = tuple((turn.role, turn.content) for turn in turns)
    return Example(id=label, messages=messages, more=_json(more) if more else "")


def to_question(messages: Sequence[Mapping[str, Any]]) -> Example:
    """Return the messages of a conversation that the assistant is to answer.

    Raises:
        BadRowError: A message cannot be used, or nothing is left to answer.
    """
    turns = _messages({"messages": messages}, "messages")
    if turns[-1].role not in ("user", "tool"):
        raise BadRowError(f"the last message has the role {turns[-1].role!r}, so there is nothing to answer")
    fields = [dict(sorted(turn.fields.items())) for turn in turns]
    more = _json({"fields": fields}) if any(fields) else ""
    return Example(messages=tuple((turn.role, turn.content) for turn in turns), more=more)


def _messages(row: Mapping[str, Any], key: str) -> list[_Turn]:
    turns = row[key]
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRowError(f"{key!r} is {_kind(turns)}, expected a list of messages that is not empty")
    return [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: object, where: str) -> _Turn:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{where} is {_kind(turn)}, expected an object with 'role' and 'content'")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    fields = {str(key): value for key, value in turn.items() if _is_given(value)}
    calls_tools = "tool_calls" in fields
    if role_key not in turn or (content_key not in turn and not calls_tools):
        raise BadRowError(f"{where} has the keys {sorted(map(str, turn))}, expected 'role' and 'content'")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRowError(f"{where} has the unknown role {_shown(role)}; known are system, user, assistant, tool")
    role = _ROLES[role]
    if calls_tools and role != "assistant":
        raise BadRowError(f"'{where}.tool_calls' is in a message of role {role!r}; only the assistant calls tools")
    if calls_tools:
        _check_calls(fields["tool_calls"], f"{where}.tool_calls")
    is_learned = _is_learned(fields, role, where)
    fields = {key: value for key, value in fields.items() if key not in (role_key, content_key, "weight", "train")}
    if both := sorted(fields.keys() & {"role", "content"}):
        raise BadRowError(f"{where} has {both[0]!r} beside {role_key!r} and {content_key!r}")
    content = turn.get(content_key)
    if content is None and calls_tools:
        return _Turn(role, "", fields | {"content": None}, is_learned)
    may_be_empty = calls_tools or role == "tool"
    return _Turn(role, _content(content, f"{where}.{content_key}", may_be_empty=may_be_empty), fields, is_learned)


def _content(value: object, where: str, *, may_be_empty: bool) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    return _checked(value, where, may_be_empty=may_be_empty)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise BadRowError(f"{where} is {_kind(part)}, expected a text part such as {{'type': 'text', 'text': ...}}")
    given = {key: value for key, value in part.items() if value is not None}
    if given.get("type") != "text" or given.keys() != {"type", "text"}:
        found = ", ".join(f"{key!r}" for key in given)
        raise BadRowError(
            f"{where} is a part of type {_shown(given.get('type'))} with {found}; only text can be learned"
        )
    return _checked(given["text"], f"{where}.text", may_be_empty=True)


def _check_calls(calls: object, where: str) -> None:
    if not isinstance(calls, list | tuple):
        raise BadRowError(f"'{where}' is {_kind(calls)}, expected a list of objects")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRowError(f"'{where}[{i}]' has no function with a name")


def _is_learned(fields: Mapping[str, Any], role: str, where: str) -> bool:
    """Return what `weight` and `train` of a message say; by default the assistant's messages are learned."""
    said: dict[str, bool] = {}
    for key in ("weight", "train"):
        value = fields.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRowError(f"'{where}.{key}' is {_shown(value)}; a message is learned (1, true) or not (0, false)")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise BadRowError(f"{where} has weight {fields['weight']} and train {_json(fields['train'])}")
    is_learned = next(iter(said.values()), role == "assistant")
    if is_learned and role != "assistant":
        raise BadRowError(f"'{where}.{next(iter(said))}' is set for the role {role!r}; only the assistant is learned")
    return is_learned


def _tools(value: object) -> list[Any]:
    """Return the tools of a row: a list of JSON schemas, or a string that holds one."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"'tools' holds bad JSON: {error}") from error
    if not _is_given(value):
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRowError(f"'tools' is {_kind(value)}, expected a list of objects")
    return list(value)


def _refuse_unused(row: Mapping[str, Any], keys: Sequence[str], form: str, fix: str) -> None:
    """Refuse keys that this form of a row ignores, although they say what is to be learned."""
    for key in keys:
        if _is_given(row.get(key)) and not (key in ("weight", "train") and row[key] in (1, True)):
            raise BadRowError(f"has a key {key!r}, which {form} cannot use; {fix}")


def _is_given(value: object) -> bool:
    """Return whether a value says anything: null and empty strings, lists and objects do not."""
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and not value)


def _json(value: object) -> str:
    """Return JSON with the keys in their order, as templates render them."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"a field cannot be represented in JSON: {error}") from error
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise BadRowError("a field has a NUL character")
    return _checked(text, "a field")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"found {_kind(value)}")


def _choices(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise BadRowError(f"'choices' is {_kind(value)}, expected a list of two or more strings")
    choices = tuple(_checked(choice, f"choices[{i}]") for i, choice in enumerate(value))
    if len(set(choices)) < len(choices):
        raise BadRowError("'choices' has duplicates")
    return choices


def _document(row: object) -> str:
    """Return what the row says that it is a part of; empty if it says nothing."""
    if not isinstance(row, Mapping):
        return ""
    key = next((key for key in _DOCUMENT_KEYS if row.get(key) not in (None, "")), None)
    if key is None:
        return ""
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRowError(f"{key!r} is {_kind(value)}, expected a string or a number")
    return str(value)


def _label(row: Mapping[str, Any]) -> str:
    label = row.get("id", "")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRowError(f"'id' is {_kind(label)}, expected a string or a number")
    return _checked(str(label), "id", may_be_empty=True)


def _row_kind(row: object) -> str | None:
    """Return the kind of text that a row names in `source` or `label`; other values than short names are ignored."""
    found = [row.get(key) for key in ("source", "label")] if isinstance(row, Mapping) else []
    names = [str(name) for name in found if isinstance(name, str | int) and not isinstance(name, bool)]
    names = [" ".join(re.split(r"[/\\]", name)[-1].split()) for name in names]  # folders are private
    return next((name for name in names if 0 < len(name) <= MAX_KIND and name.isprintable()), None)


def _text(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    return _checked(row[key], key, may_be_empty=may_be_empty)


def _checked(value: object, what: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"'{what}' is {_kind(value)}, expected a string")
    if not may_be_empty and not value.strip():
        raise BadRowError(f"'{what}' is empty")
    if "\0" in value:
        raise BadRowError(f"'{what}' has a NUL character at position {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"'{what}' is not valid UTF-8 at position {error.start + 1}") from error
    return value


def _kind(value: object) -> str:
    """Name the type of a value in JSON's terms."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", int: "a number", float: "a number"}
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else kinds.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
