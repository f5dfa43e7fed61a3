"""Strict JSON: a canonical serialization, a parser with limits, and conversion of frozen dataclasses.

Canonical: UTF-8, keys sorted, indented by two spaces, one newline at the end. Equal values give equal bytes, so a
digest of the bytes is a digest of the value. Round trip, for every value it accepts that holds lists, not tuples:

    parse_json(canonical_json(value), source="...") == value

A record is a frozen dataclass whose fields are exactly the keys of the JSON object. A field declared with `later` was
added to its schema after the first files were written: if its key is missing, it takes its default. One declared with
`rare` is also left out where it has its default, so that older files keep their bytes. Field types may be str, int,
float, dict, another record, a tuple of these, or one of them `| None`. A record class with a field `extra` keeps
unknown keys of a newer minor schema there, and writes them back.
"""

import json
import math
import re
from dataclasses import field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, TypeAlias, TypeVar, get_args, get_origin

from ...domains.errors import IncompatibleError, InputError, IntegrityError

JsonObject: TypeAlias = dict[str, Any]
Record = TypeVar("Record")

MAX_BYTES: Final = 4 << 20
MAX_DEPTH: Final = 32
MIN_INTEGER: Final = -(1 << 63)
MAX_INTEGER: Final = (1 << 64) - 1
EXTRA: Final = "extra"
_MAX_INTEGER_LENGTH: Final = 20  # characters, with the sign
_LATER: Final = "later"
_RARE: Final = "rare"


def canonical_json(value: object) -> bytes:
    """Return the value as canonical JSON.

    Raises:
        ValueError: It holds NaN, infinity, a key that is not a string, or an unsupported type, or is nested too deeply.
    """
    _check(value, depth=0)
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def parse_json(data: bytes, *, source: str, max_bytes: int = MAX_BYTES) -> Any:
    """Parse JSON bytes strictly and return the value.

    Raises:
        IntegrityError: The input is too large, not UTF-8, not JSON, or ambiguous (such as a repeated key).
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


def later(default: Any) -> Any:
    """Declare a field whose key may be missing in older files; it is always written."""
    return field(default=default, metadata={_LATER: True})


def rare(default: Any) -> Any:
    """Declare a field whose key is missing where it has its default."""
    return field(default=default, metadata={_LATER: True, _RARE: True})


def record_to_json(record: Any) -> JsonObject:
    """Return the record as JSON values, with its `extra` keys beside its own."""
    left_out = {f.name for f in fields(record) if _RARE in f.metadata and getattr(record, f.name) == f.default}
    names = [name for name in field_names(type(record)) if name not in left_out]
    values = {name: _to_json(getattr(record, name)) for name in names}
    return {**getattr(record, EXTRA, {}), **values}


def record_from_json(
    kind: type[Record], value: object, *, source: str, key: str = "", keeps_unknown: bool = False
) -> Record:
    """Return a record from a JSON object; `key` is the object's path in the file.

    Raises:
        IntegrityError: A key is missing, unknown or of the wrong type; the message names it.
    """
    if not isinstance(value, dict):
        raise _bad_key(source, key, f"expected an object, found {_name_of(value)}")
    types: dict[str, Any] = {field.name: field.type for field in fields(kind) if field.name != EXTRA}  # type: ignore[arg-type]
    prefix = f"{key}." if key else ""
    may_miss = {field.name for field in fields(kind) if _LATER in field.metadata}  # type: ignore[arg-type]
    _refuse_first(types.keys() - may_miss - value.keys(), "is missing", source=source, prefix=prefix)
    unknown = value.keys() - types.keys()
    if not keeps_unknown:
        _refuse_first(unknown, "is unknown", source=source, prefix=prefix)
    members = {
        name: _from_json(types[name], value[name], source=source, key=prefix + name, keeps_unknown=keeps_unknown)
        for name in types
        if name in value
    }
    if unknown:
        members[EXTRA] = {name: value[name] for name in unknown}
    try:
        return kind(**members)
    except (ValueError, InputError) as error:
        raise _bad_key(source, key, _problem_of(error)) from error


def field_names(kind: Any) -> list[str]:
    """Return the keys of a record class."""
    return [field.name for field in fields(kind) if field.name != EXTRA]


def minor_of(schema: object, *, known: str, source: str) -> int:
    """Return the minor version of a schema: 0 for `lorary.pack/1`, 3 for `lorary.pack/1.3`.

    Raises:
        IntegrityError: The schema is not of the same family as `known`.
        IncompatibleError: Its major version differs from that of `known`.
    """
    family, _, major = known.partition("/")
    match = re.fullmatch(rf"{re.escape(family)}/([0-9]{{1,6}})(?:\.([0-9]{{1,6}}))?", str(schema))
    if match is None:
        raise _bad_key(source, "schema", f"expected {known!r}, found {schema!r}")
    if match[1] != major:
        raise IncompatibleError(
            f"{source} has an unsupported schema.",
            cause=f"Expected {known!r}, found {schema!r}.",
            fix="Install a version that supports it: pip install --upgrade lorary",
        )
    return int(match[2] or 0)


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
    # check the length first: converting thousands of digits is slow
    if len(text) > _MAX_INTEGER_LENGTH:
        raise ValueError(f"The integer {text[:20]}... does not fit into 64 bits.")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a valid JSON number.")


def _check(value: object, *, depth: int) -> None:
    """Raise ValueError if canonical JSON cannot represent the value unambiguously; used for reading and writing."""
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
                raise ValueError(f"{value} is not a valid JSON number.")
        case list() | tuple() | dict():
            _check_members(value, depth=depth + 1)
        case _:
            raise ValueError(f"JSON cannot represent {type(value).__name__}.")


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
        raise ValueError(f"The text {text!r} has an unpaired surrogate.") from error


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        return record_to_json(value)
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(kind: Any, value: object, *, source: str, key: str, keeps_unknown: bool) -> Any:
    if isinstance(kind, UnionType):
        if value is None:
            return None
        (kind,) = (option for option in get_args(kind) if option is not NoneType)
    if is_dataclass(kind):
        return record_from_json(kind, value, source=source, key=key, keeps_unknown=keeps_unknown)  # type: ignore[arg-type]
    if get_origin(kind) is tuple and isinstance(value, list):
        item = get_args(kind)[0]
        return tuple(
            _from_json(item, member, source=source, key=f"{key}[{i}]", keeps_unknown=keeps_unknown)
            for i, member in enumerate(value)
        )
    if kind is float and type(value) is int:
        return float(value)
    # exact type, because isinstance accepts bool as int
    if type(value) is not (get_origin(kind) or kind):
        raise _bad_key(source, key, f"expected {_name_of_type(kind)}, found {_name_of(value)}")
    return value


def _refuse_first(names: set[str], problem: str, *, source: str, prefix: str) -> None:
    if names:
        raise _bad_key(source, prefix + min(names), problem)


def _bad_key(source: str, key: str, problem: str) -> IntegrityError:
    where = f"Key {key!r}: " if key else ""
    fix = "Restore the file from a backup, or make the registry anew: registry init"
    return IntegrityError(f"{source} cannot be used.", cause=f"{where}{problem}.", fix=fix)


def _problem_of(error: ValueError | InputError) -> str:
    message = error.message if isinstance(error, InputError) else str(error)
    return message.removesuffix(".")


def _name_of(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def _name_of_type(kind: Any) -> str:
    plain = get_origin(kind) or kind
    return "list" if plain is tuple else plain.__name__
