"""Convert rows, objects with one of the known sets of keys, to examples.

    {"text": ...}
    {"prompt": ..., "completion": ..., "choices": [...]}                choices are optional
    {"messages": [{"role": "user", "content": ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}                   Alpaca; input is optional
    {"conversations": [{"from": "human", "value": ...}, ...]}           ShareGPT

The first form whose keys are all present and not empty is used, in this order; other keys are ignored. `id`, a string
or an integer, is kept as a label. A null value counts as missing. Text is not changed; it must be UTF-8 without NUL.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorpusError
from .example import Example

ACCEPTED_KEYS = "text | prompt, completion[, choices] | messages | instruction, output[, input] | conversations"
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


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
        return _to_example(row.value)
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
    completion = _text(row, "completion")
    choices = _choices(row.get("choices"))
    if choices and completion not in choices:
        raise BadRowError(f"'completion' {_shown(completion)} is not among the choices")
    return Example(_text(row, "prompt", may_be_empty=True), completion, choices, label)


def _from_alpaca(row: Mapping[str, Any], label: str) -> Example:
    prompt = _text(row, "instruction") + "\n\n"
    if row.get("input", "") != "":
        prompt += _text(row, "input") + "\n\n"
    return Example(prompt, _text(row, "output"), id=label)


def _from_messages(row: Mapping[str, Any], label: str) -> Example:
    return Example(id=label, messages=_messages(row, "messages"))


def _from_sharegpt(row: Mapping[str, Any], label: str) -> Example:
    return Example(id=label, messages=_messages(row, "conversations"))


_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Example]] = {
    ("text",): _from_text,
    ("prompt", "completion"): _from_prompt,
    ("messages",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    ("conversations",): _from_sharegpt,
}


def _messages(row: Mapping[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    turns = row[key]
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRowError(f"{key!r} is {_kind(turns)}, expected a list of messages that is not empty")
    messages = tuple(_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns))
    if "assistant" not in {role for role, _ in messages}:
        raise BadRowError(f"{key!r} has no assistant message, so there is nothing to learn")
    return messages


def _message(turn: object, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{where} is {_kind(turn)}, expected an object with 'role' and 'content'")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if role_key not in turn or content_key not in turn:
        raise BadRowError(f"{where} has the keys {sorted(map(str, turn))}, expected 'role' and 'content'")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRowError(f"{where} has the unknown role {_shown(role)}; known are system, user, assistant")
    return _ROLES[role], _checked(turn[content_key], f"{where}.{content_key}")


def _choices(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise BadRowError(f"'choices' is {_kind(value)}, expected a list of two or more strings")
    choices = tuple(_checked(choice, f"choices[{i}]") for i, choice in enumerate(value))
    if len(set(choices)) < len(choices):
        raise BadRowError("'choices' has duplicates")
    return choices


def _label(row: Mapping[str, Any]) -> str:
    label = row.get("id", "")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRowError(f"'id' is {_kind(label)}, expected a string or a number")
    return _checked(str(label), "id", may_be_empty=True)


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
