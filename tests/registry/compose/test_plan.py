"""Plans of compositions: versions, priors, sizes, and how they are shown."""

import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import InputError, NotFoundError
from lorary.registry import Registry
from lorary.registry.compose.plan import _per_layer, constant_gates, prior_shares


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
def test_domains_share_the_prior_that_kp_leaves_unless_general_is_weighted(
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
def test_constant_gates_are_the_weights_and_share_the_rest(
    weights: dict[str, float | None], expected: dict[str, float]
) -> None:
    assert constant_gates(weights) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["cooking+sailing", "sailing+cooking", "sailing@1+general+cooking@latest"])
def test_a_plan_names_versions_and_has_general_first(text: str, whole: Registry) -> None:
    plan = whole.plan(text)

    assert plan.pinned == "general@1+cooking@1+sailing@1"
    assert [slot.prior for slot in plan.slots] == pytest.approx([0.6, 0.2, 0.2])
    assert plan.experts_per_layer == (0, 3, 6, 9)
    assert plan.ranks_per_layer == (0, 6, 12, 18)
    assert plan.parameters == sum(expert.parameters for m in whole.list() for expert in m.experts)


def test_the_pinned_composition_gives_the_same_plan(whole: Registry) -> None:
    plan = whole.plan("sailing")

    assert whole.plan(plan.pinned).slots == plan.slots


def test_general_alone_is_a_composition(whole: Registry) -> None:
    assert whole.plan("general").pinned == "general@1"


@pytest.mark.parametrize("text", ["", "cooking+", "cooking cooking", "cooking:0", "cooking:-1", "Cooking", "a+a"])
def test_a_text_that_violates_the_grammar_is_refused(text: str, whole: Registry) -> None:
    with pytest.raises(InputError) as caught:
        whole.plan(text)

    assert caught.value.exit_code == 2


def test_an_unknown_domain_is_refused_with_the_known_ones(whole: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        whole.plan("cokking")

    assert "cooking, general, sailing" in str(caught.value.cause)
    assert "cooking" in str(caught.value.fix)


def test_an_alias_chooses_the_version(cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)
    registry.store.set_alias("cooking", "production", 1)

    assert registry.plan("cooking@production").pinned == "general@1+cooking@1"


def test_planning_does_not_import_torch() -> None:
    program = (
        "import sys, lorary.registry.compose.plan, lorary.registry.compose.saved; sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- how a plan is shown ---


def test_a_plan_shows_versions_priors_and_parameters(whole: Registry) -> None:
    plan = whole.plan("cooking+sailing")

    assert repr(plan) == (
        "Plan('cooking+sailing', routed, slots={general@1: 0.6, cooking@1: 0.2, sailing@1: 0.2}, "
        f"parameters={plan.parameters:_})"
    )
    assert "static" in repr(whole.plan("cooking", static=True))


def test_the_html_of_a_plan_has_a_row_per_slot_with_experts_and_ranks_per_layer(whole: Registry) -> None:
    page = whole.plan("cooking")._repr_html_()

    assert page.count("<tr>") == 1 + 2 + 1  # headings, slots, sum
    assert "<td>cooking</td><td>1</td><td>0.4</td>" in page
    assert "<td>all slots</td><td></td><td></td><td>0, 2, 4, 6</td><td>0, 4, 8, 12</td>" in page


def test_text_in_a_plan_cannot_become_markup(whole: Registry) -> None:
    plan = whole.plan("cooking")
    manifest = copy(plan.slots[1].manifest)
    object.__setattr__(manifest, "name", "<script>alert(1)</script>")  # a real manifest refuses this name

    page = replace(plan, slots=(replace(plan.slots[1], manifest=manifest),))._repr_html_()

    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_runs_of_equal_layers_are_shortened() -> None:
    assert _per_layer([0, 0, 4, 4, 4, 6]) == "2 x 0, 3 x 4, 6"
    assert _per_layer(()) == ""


def test_weights_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(InputError, match="too large"):
        prior_shares({"general": None, "medicine": 1e308, "legal": 1e308})
