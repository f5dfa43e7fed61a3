import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.errors import IncompatibleError, IntegrityError
from lorary.registry.store.strict_json import (
    MAX_DEPTH,
    MAX_INTEGER,
    MIN_INTEGER,
    canonical_json,
    field_names,
    later,
    minor_of,
    parse_json,
    record_from_json,
    record_to_json,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(MIN_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20)


def short(value):
    return repr(value)[:30]


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


@given(values)
def test_what_is_written_reads_back_as_the_same(value):
    assert parse_json(canonical_json(value), source="x") == value


@given(st.dictionaries(texts, scalars))
def test_order_of_keys_has_no_influence(value):
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_form_is_sorted_indented_utf8_with_a_final_newline():
    assert canonical_json({"b": [1, 0.5], "a": "é"}) == '{\n  "a": "é",\n  "b": [\n    1,\n    0.5\n  ]\n}\n'.encode()


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, [math.nan], {1: "a"}, {None: 1}, {"a": {1}}, b"a", "\ud800", {"\ud800": 1}]
    + [MAX_INTEGER + 1, MIN_INTEGER - 1, 10**4000, nested(MAX_DEPTH + 1)],
    ids=short,
)
def test_value_without_an_unambiguous_form_is_not_written(value):
    with pytest.raises(ValueError, match="."):
        canonical_json(value)


def test_value_that_holds_itself_is_not_written():
    value = []
    value.append(value)

    with pytest.raises(ValueError, match="deeper"):
        canonical_json(value)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'[{"b": {"a": 1, "\\u0061": 2}}]', "'a' occurs twice"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"-Infinity", "-Infinity"),
        (b"1e999", "inf"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 32"),
        (b'{"a":' * 100_000, "deeper than 32"),
        (b"9" * 21, "64 bits"),
        (b"9" * 100_000, "64 bits"),
        (b"18446744073709551616", "64 bits"),
        (b"-9223372036854775809", "64 bits"),
        (b'"\xff"', "utf-8"),
        (b'"\\ud800"', "surrogate"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "property name"),
    ],
    ids=short,
)
def test_doubtful_bytes_are_refused_with_the_cause(data, cause):
    with pytest.raises(IntegrityError, match="spec.json is not valid JSON") as caught:
        parse_json(data, source="spec.json")

    assert cause in str(caught.value.cause)
    assert caught.value.fix


def test_depth_at_the_limit_is_read():
    value = nested(MAX_DEPTH)

    assert parse_json(canonical_json(value), source="x") == value


def test_too_many_bytes_are_refused():
    assert parse_json(b"[1, 2]", source="x", max_bytes=6) == [1, 2]
    with pytest.raises(IntegrityError) as caught:
        parse_json(b"[1, 2]", source="x", max_bytes=5)
    assert "6 bytes; at most 5" in str(caught.value.cause)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    try:
        value = parse_json(data, source="x")
    except IntegrityError:
        return
    assert parse_json(canonical_json(value), source="x") == value


# --- records ---


@dataclass(frozen=True, kw_only=True)
class Leaf:
    weight: float
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaf: Leaf
    leaves: tuple[Leaf, ...]
    names: tuple[str, ...]
    notes: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


TREE = Tree(
    leaf=Leaf(weight=0.5, label=None),
    leaves=(Leaf(weight=1.0, label="x"),),
    names=("a",),
    notes={"n": [1]},
)


def test_record_reads_back_as_the_same():
    assert record_from_json(Tree, record_to_json(TREE), source="x") == TREE


def test_whole_number_is_a_float_where_one_is_expected():
    leaf = record_from_json(Leaf, {"weight": 2, "label": None}, source="x")

    assert type(leaf.weight) is float


@pytest.mark.parametrize("weight", [True, "2", None])
def test_other_values_are_no_float(weight):
    with pytest.raises(IntegrityError) as caught:
        record_from_json(Leaf, {"weight": weight, "label": None}, source="x")

    assert "expected float" in str(caught.value.cause)


def test_unknown_keys_are_kept_only_when_asked():
    value = {**record_to_json(TREE), "new": 1}

    with pytest.raises(IntegrityError, match="x cannot be used"):
        record_from_json(Tree, value, source="x")
    tree = record_from_json(Tree, value, source="x", keeps_unknown=True)

    assert tree.extra == {"new": 1}
    assert record_to_json(tree) == value


def test_a_key_that_older_files_do_not_have_is_written_and_may_be_missing():
    @dataclass(frozen=True, kw_only=True)
    class Bud:
        weight: float
        leaves: int = later(3)

    assert record_to_json(Bud(weight=1.0)) == {"weight": 1.0, "leaves": 3}
    assert record_from_json(Bud, {"weight": 1.0}, source="x") == Bud(weight=1.0, leaves=3)
    with pytest.raises(IntegrityError):
        record_from_json(Bud, {"leaves": 2}, source="x")


def test_extra_is_no_key():
    assert field_names(Tree) == ["leaf", "leaves", "names", "notes"]


@pytest.mark.parametrize(("schema", "minor"), [("a.b/1", 0), ("a.b/1.0", 0), ("a.b/1.12", 12)])
def test_minor_of_a_known_schema(schema, minor):
    assert minor_of(schema, known="a.b/1", source="x") == minor


@pytest.mark.parametrize("schema", [None, 1, "", "a.b", "a.b/", "axb/1", "a.b/1.", "a.b/1.2.3", "a.b/one", "a.b/1\n"])
def test_text_that_is_no_schema_of_the_family_is_refused(schema):
    with pytest.raises(IntegrityError):
        minor_of(schema, known="a.b/1", source="x")


@pytest.mark.parametrize("schema", ["a.b/2", "a.b/0", "a.b/11.1"])
def test_other_major_is_incompatible(schema):
    with pytest.raises(IncompatibleError):
        minor_of(schema, known="a.b/1", source="x")
