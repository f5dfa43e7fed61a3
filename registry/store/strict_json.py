"""JSON with one way to write it, and a reader that accepts nothing doubtful.

Canonical: UTF-8, keys sorted, indented by two spaces, one newline at the end. Equal values give equal bytes, so a
digest of the bytes is a digest of the value. Round trip, for every value of lists and dicts that it takes:

    parse_json(canonical_json(value), source="...") == value
"""

import json
import math
from typing import Any, Final, TypeAlias

from ...domains.errors import IntegrityError

JsonObject: TypeAlias = dict[str, Any]

MAX_BYTES: Final = 4 << 20
MAX_DEPTH: Final = 32
MIN_INTEGER: Final = -(1 << 63)
MAX_INTEGER: Final = (1 << 64) - 1
_MAX_INTEGER_LENGTH: Final = 20  # characters, with the sign


def canonical_json(value: object) -> bytes:
    """Return the value as canonical JSON.

    Raises:
        ValueError: It holds NaN, infinity, a key that is no text, what JSON has no form for, or is nested too deep.
    """
    _check(value, depth=0)
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def parse_json(data: bytes, *, source: str, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value that the bytes describe.

    Raises:
        IntegrityError: They are too many, not UTF-8, not JSON, or JSON that two readers may understand differently.
    """
    try:
        if len(data) > max_bytes:
            raise ValueError(f"It has {len(data)} bytes; at most {max_bytes} are read.")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=_no_constant,
        )
        _check(value, depth=0)
    except RecursionError as error:
        raise _unreadable(source, f"It is nested deeper than {MAX_DEPTH}.") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise _unreadable(source, str(error)) from error
    return value


def _unreadable(source: str, cause: str) -> IntegrityError:
    fix = "Restore the file from a backup, or make the registry anew: registry init"
    return IntegrityError(f"{source} is not valid JSON.", cause=cause, fix=fix)


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    members: JsonObject = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"The key {key!r} occurs twice in one object.")
        members[key] = value
    return members


def _integer(text: str) -> int:
    # by length first: converting thousands of digits is slow
    if len(text) > _MAX_INTEGER_LENGTH:
        raise ValueError(f"The integer {text[:20]}... does not fit into 64 bits.")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON.")


def _check(value: object, *, depth: int) -> None:
    """Refuse what canonical JSON has no unambiguous form for; the same for writing and reading."""
    match value:
        case None | bool():
            pass
        case str():
            _check_text(value)
        case int():
            if not MIN_INTEGER <= value <= MAX_INTEGER:
                raise ValueError("An integer does not fit into 64 bits.")
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a number of JSON.")
        case list() | tuple() | dict():
            _check_members(value, depth=depth + 1)
        case _:
            raise ValueError(f"JSON has no form for {type(value).__name__}.")


def _check_members(value: list[Any] | tuple[Any, ...] | JsonObject, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"It is nested deeper than {MAX_DEPTH}.")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"The key {key!r} is not text.")
            _check_text(key)
    for member in value.values() if isinstance(value, dict) else value:
        _check(member, depth=depth)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"The text {text!r} has half a surrogate pair.") from error
