"""The gates as one step of autograd: the gradients of their definition, and nothing kept but what enters."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.kernels import reference
from lorary.adapters.layer.gates import LayerGates

WIDTH, TOKENS = 16, 12


def gradients(gates: LayerGates, compute: Callable, scale: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The gates, and what a loss of them and of the new experts' shares gives everything that takes part."""
    generator = torch.Generator().manual_seed(seed)
    slots = int(gates.slot_of_expert.max()) + 1
    hidden: Any = (torch.randn(3, 4, WIDTH, generator=generator) * scale).requires_grad_()
    slot_gate: Any = torch.softmax(torch.randn(3, 4, slots, generator=generator), -1).requires_grad_()
    found, use = compute(hidden, slot_gate)
    loss = (found * torch.randn(found.shape, generator=generator)).sum()
    if use is not None:
        loss = loss + (use * torch.randn(use.shape, generator=generator)).sum()
    names = [hidden, slot_gate, *gates.parameters()]
    return found, list(torch.autograd.grad(loss, names))


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4),
    new=st.integers(0, 1),
    rank_gates=st.booleans(),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**31 - 1),
)
def test_gates_and_gradients_are_those_of_the_definition(
    groups: list[list[int]], new: int, rank_gates: bool, scale: float, seed: int, random_gates: Any
) -> None:
    gates = random_gates(groups, width=WIDTH, new=new, rank_gates=rank_gates).train()
    count = len(groups[-1]) if new else 0

    def by_definition(hidden: Tensor, slot_gate: Tensor) -> tuple[Tensor, Tensor | None]:
        tables = gates.tables()
        found = reference.scores(hidden, tables.rows)
        experts = reference.expert_gates(found, tables.same_group)
        return reference.gated_ranks(found, slot_gate, experts, tables), experts[..., -count:] if count else None

    def in_one_step(hidden: Tensor, slot_gate: Tensor) -> tuple[Tensor, Tensor | None]:
        return gates.with_use(hidden, slot_gate)

    found, mine = gradients(gates, in_one_step, scale, seed)
    expected, theirs = gradients(gates, by_definition, scale, seed)

    torch.testing.assert_close(found, expected)
    # the gradient of a hidden state is that of its direction over its length, and rounded where its terms cancel
    sizes = [10 / max(scale, 1e-6), *[1.0] * (len(mine) - 1)]
    for grad, wanted, size in zip(mine, theirs, sizes, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5 * max(float(wanted.abs().max()), size))


def test_nothing_of_the_size_of_the_ranks_is_kept(random_gates: Any) -> None:
    gates = random_gates([[8, 8], [8]], width=WIDTH, new=1).train()
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        gates(hidden, torch.full((1, TOKENS, 2), 0.5))

    assert (1, TOKENS, WIDTH) in kept
    assert all(TOKENS not in shape or shape in [(1, TOKENS, WIDTH), (1, TOKENS, 2)] for shape in kept)


def test_only_a_forward_that_trains_tells_how_the_new_experts_are_used(random_gates: Any) -> None:
    gates = random_gates([[2], [2, 2]], width=WIDTH, new=1).train()
    hidden, slot_gate = torch.randn(1, TOKENS, WIDTH), torch.full((1, TOKENS, 2), 0.5)

    assert gates.with_use(hidden, slot_gate)[1].shape == (1, TOKENS, 2)
    with torch.no_grad():
        assert gates.with_use(hidden, slot_gate)[1] is None
