"""Warm start of a new bank: copied from a bank of the same shape, or initialized from activations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.adapters.bank import ExpertBank, new_bank
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.adapters.training.warm_start import (
    activation_weights,
    can_copy_experts,
    centroids,
    copy_experts,
    seed_expert_gates,
)
from lorary.domains.base_model import find_layout
from lorary.domains.data.blocks import Blocks


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return tiny_llama(vocab_size=64)


@pytest.fixture
def fresh(model: Any, bank_config: Any) -> Callable[..., ExpertBank]:
    """`fresh(seed=.., rank=.., ..)`: a new bank; keywords of `BankConfig`."""

    def make(seed: int = 0, **config: Any) -> ExpertBank:
        generator = torch.Generator().manual_seed(seed)
        return new_bank(model, find_layout(model), bank_config(**config), generator=generator)

    return make


@pytest.fixture
def blocks() -> Blocks:
    """Twenty rows of sixteen tokens; every second row ends with four tokens of padding."""
    ids = torch.randint(3, 64, (20, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 12:] = 0
    return Blocks(ids * mask, (ids * mask).masked_fill(mask == 0, -100), mask)


def trained(bank: ExpertBank) -> ExpertBank:
    """Fill a bank with random values in place, as if it had been trained, and return it."""
    generator = torch.Generator().manual_seed(5)
    for layer in bank.layers.values():
        for tensor in [*layer.A.values(), *layer.B.values(), layer.expert_gate]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        layer.mean_gate = torch.rand(layer.rank, generator=generator)
    return bank


# --- copying ---


def test_everything_but_mean_gates_is_copied_between_banks_of_one_shape(fresh: Any) -> None:
    source_bank, bank = trained(fresh()), fresh(seed=1)
    assert can_copy_experts(source_bank, bank)

    copy_experts(source_bank, bank)

    for index, layer in bank.layers.items():
        source = source_bank.layers[index]
        assert layer.mean_gate is None
        assert torch.equal(layer.expert_gate, source.expert_gate)
        for target in layer.A:
            assert torch.equal(layer.A[target], source.A[target])
            assert torch.equal(layer.B[target], source.B[target])


def test_copied_tensors_share_no_memory(fresh: Any) -> None:
    source_bank, bank = trained(fresh()), fresh(seed=1)
    copy_experts(source_bank, bank)
    before = {name: tensor.clone() for name, tensor in source_bank.tensors()}

    for _, tensor in bank.tensors():
        tensor.add_(1)

    assert all(torch.equal(tensor, before[name]) for name, tensor in source_bank.tensors())


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 3},
        {"experts": 3.0},
        {"schedule": "uniform"},
        {"expert_free": 0.5},
        {"alpha": 3.0},
        {"method": "rslora"},
        {"targets": ("q_proj",)},
        {"rank_gates": False},
    ],
    ids=str,
)
def test_banks_of_different_shapes_cannot_be_copied(config: dict[str, Any], fresh: Any) -> None:
    assert not can_copy_experts(trained(fresh(**config)), fresh())
    assert not can_copy_experts(trained(fresh()), fresh(**config))


# --- seeding from activations ---


def test_seeding_sets_the_expert_gates_and_nothing_else(model: Any, fresh: Any, blocks: Blocks) -> None:
    bank = fresh()
    before = {name: tensor.clone() for name, tensor in bank.tensors()}

    seed_expert_gates(bank, model, blocks)

    changed = {name for name, tensor in bank.tensors() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("expert_gate")}
    for name, tensor in bank.tensors():
        assert tensor.shape == before[name].shape
        assert tensor.isfinite().all()


def test_seeding_twice_gives_the_same_bytes(model: Any, fresh: Any, blocks: Blocks) -> None:
    banks = [fresh(), fresh()]
    for bank in banks:
        seed_expert_gates(bank, model, blocks)
        torch.rand(3)

    one, other = (dict(bank.tensors()) for bank in banks)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_padding_is_ignored(model: Any, fresh: Any, blocks: Blocks) -> None:
    bank, other = fresh(), fresh()
    seed_expert_gates(bank, model, blocks)

    noise = torch.where(blocks.attention_mask == 0, 7, blocks.input_ids)
    seed_expert_gates(other, model, replace(blocks, input_ids=noise))

    for index, layer in bank.layers.items():
        assert torch.equal(layer.expert_gate, other.layers[index].expert_gate)


def test_a_seeded_bank_leaves_the_logits_unchanged(model: Any, fresh: Any, blocks: Blocks) -> None:
    bank = fresh()
    seed_expert_gates(bank, model, blocks)

    composed = attach(model, Stack(names=("general",), banks=(bank,)), router=None, fixed=torch.ones(1))

    with torch.inference_mode():
        assert torch.equal(composed(blocks.input_ids).logits, model(blocks.input_ids).logits)


def test_a_seeded_bank_has_gradients(model: Any, fresh: Any, blocks: Blocks) -> None:
    bank = fresh()
    seed_expert_gates(bank, model, blocks)
    stack = Stack(names=("general",), banks=(bank,), trainable=True)
    composed = attach(model, stack, router=None, fixed=torch.ones(1))

    composed.train()(input_ids=blocks.input_ids, labels=blocks.input_ids).loss.backward()

    assert all(p.grad is not None for name, p in composed.named_parameters() if ".new_" in name)


def test_centroids_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    owner = torch.arange(90) % 3
    noise = 0.05 * torch.randn(90, 16, generator=generator)
    points = F.normalize(5 + directions[owner] + noise, dim=-1)

    rows = centroids(points, 3)

    chosen = (F.normalize(points, dim=-1) @ F.normalize(rows, dim=-1).T).argmax(1)
    assert len({int(chosen[i]) for i in range(3)}) == 3
    assert torch.equal(chosen, chosen[:3][owner])


@pytest.mark.parametrize(("points", "count"), [(0, 1), (0, 3), (1, 1), (2, 3), (3, 2), (5, 3), (63, 1), (64, 5)])
def test_centroids_have_the_requested_shape_even_for_few_points(points: int, count: int) -> None:
    found = centroids(torch.randn(points, 8, generator=torch.Generator().manual_seed(0)), count)

    assert found.shape == (count, 8)
    assert found.isfinite().all()


# --- layer weights ---


def test_layers_that_rotate_their_input_more_have_larger_weights(model: Any, blocks: Blocks) -> None:
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(part).weight.mul_(20)

    weights: list[float] = activation_weights(model, blocks, layers=range(1, 4))

    assert len(weights) == 3
    assert max(weights) == weights[1]
    assert all(weight > 0 for weight in weights)


def test_layer_weights_ignore_padding(model: Any, blocks: Blocks) -> None:
    noise: Tensor = torch.where(blocks.attention_mask == 0, 7, blocks.input_ids)

    found = activation_weights(model, replace(blocks, input_ids=noise), layers=range(1, 4))

    assert found == activation_weights(model, blocks, layers=range(1, 4))
