"""Banks: new ones, and a bank extended by a new generation of experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.adapters.bank import Expert, ExpertBank, LayerExperts, concat_layers, extend_bank, new_bank
from lorary.domains.base_model import find_layout


@pytest.fixture
def addition(bank_config: Any) -> Callable[..., ExpertBank]:
    """`addition(base, older, rank=3, ..)`: a new bank whose experts extend these older ones."""

    def make(base: Any, older: tuple[Expert, ...], **changes: Any) -> ExpertBank:
        generator = torch.Generator().manual_seed(5)
        return new_bank(base, find_layout(base), bank_config(**changes), generator=generator, older=older)

    return make


def test_ids_and_generations_continue_those_of_the_older_experts(base: Any, addition: Any) -> None:
    first = addition(base, ())
    second = addition(base, first.experts, rank=3)
    third = addition(base, extend_bank(first, second).experts)

    assert [(e.id, e.generation) for e in first.experts] == [("e0", 0), ("e1", 0), ("e2", 0)]
    assert [(e.id, e.generation, e.rank) for e in second.experts] == [("e3", 1, 3), ("e4", 1, 3), ("e5", 1, 3)]
    assert {e.generation for e in third.experts} == {2}
    assert third.experts[0].id == "e6"


def test_experts_of_an_extended_bank_are_sorted_by_generation_in_every_layer(base: Any, addition: Any) -> None:
    first = addition(base, ())

    bank = extend_bank(first, addition(base, first.experts, schedule="uniform"))

    order = [expert.id for expert in bank.experts]
    assert order == ["e0", "e1", "e2", "e3", "e4"]
    for layer in bank.layers.values():
        assert [expert.id for expert in layer.experts] == sorted(expert.id for expert in layer.experts)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000))
def test_extending_keeps_every_byte_of_the_older_experts(seed: int, make_base: Any, random_bank: Any) -> None:
    model = make_base("llama")
    first, second = random_bank(model, seed=seed), random_bank(model, seed=seed + 1, first_layer=2)

    bank = extend_bank(first, second)

    assert bank.parameters >= first.parameters + second.parameters
    for index, old in first.layers.items():
        layer = bank.layers[index]
        for target in old.A:
            assert torch.equal(layer.A[target][: old.rank], old.A[target])
            assert torch.equal(layer.B[target][:, : old.rank], old.B[target])
        assert torch.equal(layer.expert_gate[: len(old.experts)], old.expert_gate)
        assert torch.equal(layer.rank_rows()[: old.rank], old.rank_rows())
        assert torch.equal(layer.scales()[: old.rank], old.scales())


def test_a_target_that_one_side_does_not_extend_is_filled_with_zeros(random_layer: Any) -> None:
    left: LayerExperts = random_layer([(2, 1.0, "lora")], {"q": (3, 4)}, width=8, rank_gates=False)
    right: LayerExperts = random_layer([(1, 1.0, "lora")], {"k": (3, 5)}, width=8, seed=1, mean_gate=True)

    both = concat_layers(left, right)

    assert both.A["q"].shape == (3, 3)
    assert both.B["k"].shape == (5, 3)
    assert not both.A["q"][2:].any()
    assert not both.B["k"][:, :2].any()
    assert not both.rank_rows()[:2].any()  # factors of 1, as they were
    assert both.mean_gate is not None
    assert torch.equal(both.mean_gate[:2], left.static_gate())
    assert torch.equal(both.mean_gate[2:], right.static_gate())
