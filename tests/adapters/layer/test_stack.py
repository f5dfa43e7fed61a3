"""Stacks in which a slot has an older generation of experts, frozen, and a new one that is trained."""

from typing import Any

import pytest
import torch

from lorary.adapters.bank import ExpertBank, extend_bank, new_bank
from lorary.adapters.kernels.reference import expert_gates, scores
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.stack import Stack, build_gates, layer_slices
from lorary.domains.base_model import find_layout


@pytest.fixture
def generations(base: Any, random_bank: Any, bank_config: Any) -> tuple[ExpertBank, ExpertBank, ExpertBank]:
    """KP's bank, a domain's, and a fresh addition to the latter."""
    kp, older = random_bank(base, seed=1), random_bank(base, seed=2, all_targets=True)
    config = bank_config(schedule="uniform")
    generator = torch.Generator().manual_seed(0)
    return kp, older, new_bank(base, find_layout(base), config, generator=generator, older=older.experts)


def test_the_last_slot_takes_two_banks_and_no_other_does(generations: Any) -> None:
    kp, older, addition = generations
    stack = Stack(names=("general", "legal"), banks=(kp, older, addition), trainable=True)

    assert [part.slot for part in layer_slices(stack, 2)] == [0, 1, 1]
    assert [part.is_new for part in layer_slices(stack, 2)] == [False, False, True]
    with pytest.raises(ValueError, match="4 banks for 2 slots"):
        Stack(names=("general", "legal"), banks=(kp, kp, older, addition))


def test_a_new_generation_starts_as_the_older_one_alone(
    base: Any, generations: Any, random_router: Any, some_ids: Any, logits: Any
) -> None:
    kp, older, addition = generations
    router = random_router(base, slots=2)
    before = attach(base, Stack(names=("general", "legal"), banks=(kp, older)), router=router)

    stack = Stack(names=("general", "legal"), banks=(kp, older, addition), trainable=True)
    after = attach(base, stack, router=router)

    torch.testing.assert_close(
        logits(after, input_ids=some_ids(2)), logits(before, input_ids=some_ids(2)), rtol=1e-5, atol=1e-5
    )
    assert dict(trained_bank(after).tensors()).keys() == dict(addition.tensors()).keys()


def test_gates_of_the_older_generation_do_not_see_the_new_one(generations: Any, base: Any) -> None:
    kp, older, addition = generations
    width = base.config.hidden_size
    hidden: Any = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))
    for index in older.layers:
        alone = build_gates(Stack(names=("a", "b"), banks=(kp, older)).layer(index, torch.float32))
        both = build_gates(Stack(names=("a", "b"), banks=(kp, older, addition)).layer(index, torch.float32))
        count = len(alone.slot_of_expert)

        found = expert_gates(scores(hidden, both.rows), both.same_group)

        torch.testing.assert_close(
            found[..., :count], expert_gates(scores(hidden, alone.rows), alone.same_group), rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(found[..., count:].sum(-1), torch.ones(2, 9))
        assert torch.equal(both.slot_of_expert[count:], torch.ones_like(both.slot_of_expert[count:]))


def test_one_joined_bank_is_the_same_function_as_its_generations(
    base: Any, generations: Any, random_bank: Any, random_router: Any, some_ids: Any, logits: Any
) -> None:
    kp, older, addition = generations
    for layer in addition.layers.values():
        for matrix in layer.B.values():
            matrix.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.05)
    router = random_router(base, slots=2)

    apart = attach(base, Stack(names=("general", "legal"), banks=(kp, older, addition)), router=router)
    joined = attach(base, Stack(names=("general", "legal"), banks=(kp, extend_bank(older, addition))), router=router)

    found, expected = logits(joined, input_ids=some_ids(2)), logits(apart, input_ids=some_ids(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = attach(base, Stack(names=("general", "legal"), banks=(kp, older)), router=router)
    assert (found - logits(alone, input_ids=some_ids(2))).abs().max() > 1e-3
