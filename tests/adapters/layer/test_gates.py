"""Gates of a layer: shares that sum to one, factors that begin at one, and numbers that stay finite."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.bank import LayerExperts
from lorary.adapters.kernels.reference import expert_gates, rank_gates, scores
from lorary.adapters.layer.gates import TEMPERATURE, LayerGates
from lorary.adapters.layer.stack import _Slice, build_gates, stack_gates
from lorary.adapters.layer.stacked import StackedLayer

WIDTH = 16
COUNTS = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # experts of each slot
SEED = st.integers(0, 2**31 - 1)
SCALES = (0.0, 1e-20, 1e-3, 1.0, 1e4, 1e20)


@pytest.fixture(scope="session")
def gates_of(random_layer: Callable[..., LayerExperts]) -> Callable[..., LayerGates]:
    """`gates_of([2, 1], ..)`: the gates of slots with so many experts, of ranks 1, 2, 3, 1, ..."""

    def make(
        counts: list[int], *, seed: int = 0, rank_gates: bool = True, trainable: bool = False, static: bool = False
    ) -> LayerGates:
        slices = [
            _Slice(
                slot=slot,
                experts=random_layer(
                    [(1 + e % 3, 4.0, "lora") for e in range(count)],
                    {"a": (3, 3)},
                    width=WIDTH,
                    seed=seed + slot,
                    rank_gates=rank_gates,
                    mean_gate=static and slot == 0,
                ),
                is_new=trainable and slot == len(counts) - 1,
            )
            for slot, count in enumerate(counts)
        ]
        return build_gates(
            StackedLayer(
                groups=(),
                slot_of_rank=(),
                gates=stack_gates(slices, static=static),
                new=slices[-1].experts if trainable else None,
            )
        )

    return make


def random_hidden(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_slot_gate(seed: int, slots: int) -> Tensor:
    return torch.softmax(torch.randn(2, 5, slots, generator=torch.Generator().manual_seed(seed)), -1)


def sums_by_slot(by_expert: Tensor, gates: LayerGates, slots: int) -> Tensor:
    return torch.stack([by_expert[..., gates.slot_of_expert == slot].sum(-1) for slot in range(slots)], -1)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS, seed=SEED, scale=st.sampled_from(SCALES), trainable=st.booleans())
def test_expert_gates_sum_to_one_within_each_slot(
    counts: list[int], seed: int, scale: float, trainable: bool, gates_of: Any
) -> None:
    gates = gates_of(counts, seed=seed, trainable=trainable)

    by_expert = expert_gates(scores(random_hidden(seed, scale), gates.tables().rows), gates.same_group)

    torch.testing.assert_close(sums_by_slot(by_expert, gates, len(counts)), torch.ones(2, 5, len(counts)))
    assert by_expert.min() > 0


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS, seed=SEED, scale=st.sampled_from(SCALES), trainable=st.booleans())
def test_without_rank_gates_every_rank_has_its_experts_share_of_the_slot(
    counts: list[int], seed: int, scale: float, trainable: bool, gates_of: Any
) -> None:
    gates = gates_of(counts, seed=seed, rank_gates=False, trainable=trainable)
    slot_gate = random_slot_gate(seed, len(counts))

    found = gates(random_hidden(seed, scale), slot_gate)

    first_rank = [int((gates.expert_of_rank == e).nonzero()[0]) for e in range(len(gates.slot_of_expert))]
    by_expert = found[..., first_rank]
    assert torch.equal(found, by_expert[..., gates.expert_of_rank])
    torch.testing.assert_close(sums_by_slot(by_expert, gates, len(counts)), slot_gate)


@settings(deadline=None, max_examples=50)
@given(seed=SEED, scale=st.sampled_from(SCALES), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_gates_are_finite_and_bounded_for_any_size_of_the_hidden_state(
    seed: int, scale: float, dtype: torch.dtype, gates_of: Any
) -> None:
    gates: Any = gates_of([3, 2], seed=seed, trainable=True)
    hidden: Any = random_hidden(seed, scale, dtype).requires_grad_()

    found = gates(hidden, random_slot_gate(seed, 2))
    found.sum().backward()

    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 2
    assert all(tensor.grad.isfinite().all() for tensor in (hidden, gates.new_expert_gate, gates.new_rank_gate))


@settings(deadline=None, max_examples=30)
@given(seed=SEED, size=st.floats(1e-2, 1e4))
def test_gates_do_not_depend_on_the_size_of_the_hidden_state(seed: int, size: float, gates_of: Any) -> None:
    gates, hidden, slot_gate = gates_of([3, 2], seed=seed), random_hidden(seed), random_slot_gate(seed, 2)

    torch.testing.assert_close(gates(hidden * size, slot_gate), gates(hidden, slot_gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_scores_of_experts_are_bounded_by_the_temperature(size: float, random_layer: Any) -> None:
    layer = random_layer([(1, 1.0, "lora")] * 2, {"a": (3, 3)}, width=WIDTH)
    layer.expert_gate = torch.stack([torch.ones(WIDTH), -torch.ones(WIDTH)]) * size
    gates = build_gates(
        StackedLayer(
            groups=(), slot_of_rank=(), gates=stack_gates([_Slice(slot=0, experts=layer, is_new=False)], static=False)
        )
    )

    found = expert_gates(scores(torch.ones(1, 1, WIDTH), gates.rows), gates.same_group)[0, 0]

    expected = torch.softmax(torch.tensor([1.0, -1.0]) / TEMPERATURE * bool(size), 0)
    torch.testing.assert_close(found, expected)


def test_rank_gates_are_exactly_one_where_their_rows_are_zero(gates_of: Any) -> None:
    gates = gates_of([2, 3], trainable=True)
    gates.rows[gates.frozen_experts :].zero_()
    with torch.no_grad():
        gates.new_rank_gate.zero_()

    found = rank_gates(scores(random_hidden(0), gates.tables().rows), len(gates.slot_of_expert))

    assert torch.equal(found, torch.ones_like(found))


def test_rank_gates_of_a_new_bank_that_has_none_are_exactly_one(gates_of: Any) -> None:
    gates = gates_of([2], rank_gates=False, trainable=True)

    found = rank_gates(scores(random_hidden(0), gates.tables().rows), len(gates.slot_of_expert))

    assert gates.new_rank_gate is None
    assert torch.equal(found, torch.ones(2, 5, 3))


def test_another_slot_changes_the_gates_of_no_one(gates_of: Any) -> None:
    alone, both = gates_of([2]), gates_of([2, 3])
    slot_gate = random_slot_gate(0, 2)

    found = both(random_hidden(0), slot_gate)[..., :3]

    torch.testing.assert_close(found, alone(random_hidden(0), slot_gate[..., :1]))


def test_a_trainable_bank_has_the_gates_of_the_same_bank_frozen(gates_of: Any) -> None:
    frozen, trainable = gates_of([1, 3]), gates_of([1, 3], trainable=True)

    found = trainable(random_hidden(0), random_slot_gate(0, 2))

    assert torch.equal(found, frozen(random_hidden(0), random_slot_gate(0, 2)))
    assert {name for name, _ in trainable.named_parameters()} == {"new_expert_gate", "new_rank_gate"}
    assert not list(frozen.parameters())


def test_static_gates_are_slot_gates_times_measured_means(gates_of: Any) -> None:
    gates = gates_of([2, 3], static=True)
    slot_gate = random_slot_gate(0, 2)

    found = gates(random_hidden(0, 1e4), slot_gate)

    means = gates.fixed_gate
    assert torch.equal(means[3:], torch.full((6,), 1 / 3))  # not measured: one over the number of experts
    assert found.shape == (2, 5, 9)
    torch.testing.assert_close(found[..., :3], slot_gate[..., :1] * means[:3])
    torch.testing.assert_close(found[..., 3:], slot_gate[..., 1:] * means[3:])


def test_static_gates_serve_constant_slot_gates(gates_of: Any) -> None:
    gates = gates_of([2, 3], static=True)

    found = gates(random_hidden(0), torch.tensor([[[0.25, 0.75]]]))

    assert found.shape == (2, 5, 9)
    assert torch.equal(found, found[:1, :1].expand_as(found))
