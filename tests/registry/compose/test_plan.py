"""Plans of compositions: which versions, which priors, how large."""

from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import InputError, NotFoundError
from lorary.registry import Registry
from lorary.registry.compose.plan import fixed_shares, prior_shares


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"general": None}, {"general": 1.0}),
        ({"a": None}, {"general": 0.6, "a": 0.4}),
        ({"a": None, "b": None}, {"general": 0.6, "a": 0.2, "b": 0.2}),
        ({"a": 3.0, "b": None}, {"general": 0.6, "a": 0.3, "b": 0.1}),
        ({"general": 2.0, "a": None, "b": None}, {"general": 0.5, "a": 0.25, "b": 0.25}),
        ({"general": 6.0, "a": 1.0, "b": 1.0}, {"general": 0.75, "a": 0.125, "b": 0.125}),
    ],
    ids=str,
)
def test_domains_share_what_kp_leaves_of_the_prior_unless_general_is_weighted(
    weights: dict[str, float | None], expected: dict[str, float]
) -> None:
    assert prior_shares(weights) == pytest.approx(expected)
    assert sum(prior_shares(weights).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"general": None}, {"general": 1.0}),
        ({"a": None}, {"general": 0.0, "a": 1.0}),
        ({"a": None, "b": None}, {"general": 0.0, "a": 0.5, "b": 0.5}),
        ({"a": 0.7, "b": None}, {"general": 0.0, "a": 0.7, "b": 0.3}),
        ({"a": 0.7, "b": 0.6}, {"general": 0.0, "a": 0.7, "b": 0.6}),
        ({"general": None, "a": 0.75}, {"general": 0.25, "a": 0.75}),
        ({"a": 1.5, "b": None}, {"general": 0.0, "a": 1.5, "b": 0.0}),
    ],
    ids=str,
)
def test_fixed_gates_are_the_weights_and_the_rest_is_shared(
    weights: dict[str, float | None], expected: dict[str, float]
) -> None:
    assert fixed_shares(weights) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["cooking+sailing", "sailing+cooking", "sailing@1+general+cooking@latest"])
def test_a_plan_names_versions_and_has_general_first(text: str, whole: Registry) -> None:
    plan = whole.plan(text)

    assert plan.pinned == "general@1+cooking@1+sailing@1"
    assert [slot.prior for slot in plan.slots] == pytest.approx([0.6, 0.2, 0.2])
    assert plan.experts_per_layer == (0, 3, 6, 9)
    assert plan.ranks_per_layer == (0, 6, 12, 18)
    assert plan.parameters == sum(expert.parameters for m in whole.domains() for expert in m.experts)


def test_what_is_pinned_gives_the_same_plan_again(whole: Registry) -> None:
    plan = whole.plan("sailing")

    assert whole.plan(plan.pinned).slots == plan.slots


def test_general_alone_is_a_composition(whole: Registry) -> None:
    assert whole.plan("general").pinned == "general@1"


@pytest.mark.parametrize("text", ["", "cooking+", "cooking cooking", "cooking:0", "cooking:-1", "Cooking", "a+a"])
def test_what_breaks_the_grammar_is_refused(text: str, whole: Registry) -> None:
    with pytest.raises(InputError) as caught:
        whole.plan(text)

    assert caught.value.exit_code == 2


def test_an_unknown_domain_is_named_with_the_known_ones(whole: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        whole.plan("cokking")

    assert "cooking, general, sailing" in str(caught.value.cause)
    assert "cooking" in str(caught.value.fix)


def test_an_alias_chooses_the_version(cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)
    registry.store.set_alias("cooking", "production", 1)

    assert registry.plan("cooking@production").pinned == "general@1+cooking@1"
