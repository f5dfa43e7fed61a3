from dataclasses import dataclass, field
from typing import Any

import pytest

from lorary.domains.errors import IncompatibleError, IntegrityError
from lorary.registry.store.records import field_names, later, minor_of, record_from_json, record_to_json


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
