"""Frozen dataclasses as strict JSON objects: every field is a key, and nothing else is.

A field made by `later` came to its schema after the first files were written: where its key is missing, it has its
default.

Field types may be str, int, float, dict, another record, a tuple of these, or one of them `| None`. A record class with
a field `extra` keeps there the keys that only a newer minor schema knows, and writes them back.
"""

import re
from dataclasses import field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from ...domains.errors import IncompatibleError, InputError, IntegrityError
from .strict_json import JsonObject

Record = TypeVar("Record")

EXTRA = "extra"
_LATER = "later"


def later(default: Any) -> Any:
    """A field whose key older files do not have; it is always written."""
    return field(default=default, metadata={_LATER: True})


def record_to_json(record: Any) -> JsonObject:
    """Return the record as JSON values, with its `extra` keys beside its own."""
    values = {name: _to_json(getattr(record, name)) for name in field_names(type(record))}
    return {**getattr(record, EXTRA, {}), **values}


def record_from_json(
    kind: type[Record], value: object, *, source: str, key: str = "", keeps_unknown: bool = False
) -> Record:
    """Return the record that a JSON object describes; `key` is where the object stands in the file.

    Raises:
        IntegrityError: A key is missing, unknown or of the wrong type; names it.
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
    """The keys that a record class knows."""
    return [field.name for field in fields(kind) if field.name != EXTRA]


def minor_of(schema: object, *, known: str, source: str) -> int:
    """The minor number of a schema: 0 in `lorary.pack/1`, 3 in `lorary.pack/1.3`, where `lorary.pack/1` is known.

    Raises:
        IntegrityError: It is no schema of this family.
        IncompatibleError: Its major number is another.
    """
    family, _, major = known.partition("/")
    match = re.fullmatch(rf"{re.escape(family)}/([0-9]{{1,6}})(?:\.([0-9]{{1,6}}))?", str(schema))
    if match is None:
        raise _bad_key(source, "schema", f"expected {known!r}, found {schema!r}")
    if match[1] != major:
        raise IncompatibleError(
            f"{source} is of a schema that this program does not know.",
            cause=f"It says {schema!r}; this program reads {known!r}.",
            fix="Use a version of this program that knows it: pip install --upgrade lorary",
        )
    return int(match[2] or 0)


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
    # by exact type, because bool is an int to isinstance
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
