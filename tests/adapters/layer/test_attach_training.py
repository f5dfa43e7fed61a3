"""Training through a composed model moves the new bank and nothing else."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.adapters.bank import ExpertBank
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.routing import recording_routes
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.base_model import find_layout
from lorary.domains.statistics.measure import measure_statistics
from lorary.domains.statistics.token_roles import TokenRoles


@pytest.fixture(scope="session")
def train(some_ids: Any) -> Callable[..., None]:
    """`train(model)`: three steps of gradient descent on what requires gradients."""

    def run(model: Any) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            ids = some_ids(2, 12, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def bytes_of(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors}


def test_training_moves_the_last_bank_and_nothing_else(any_base: Any, compose: Any, digest: Any, train: Any) -> None:
    composed = compose(any_base, trainable=True, all_targets=True, rank_gates=True).train()
    before, banks = digest(composed), [bytes_of(bank.tensors()) for bank in composed.routing.stack.banks]

    train(composed)

    after = digest(composed)
    changed = {name for name in before if before[name] != after[name]}
    new = {name for name, parameter in composed.named_parameters() if parameter.requires_grad}
    assert all(name.rpartition(".")[2].startswith("new_") for name in new)
    # one expert alone always has gate 1: its row has nothing to learn
    lone = {
        f"{composed.routing.layout.layers}.{index}.expert_gates.new_expert_gate"
        for index, layer in composed.routing.stack.banks[-1].layers.items()
        if len(layer.experts) == 1
    }
    assert new - lone <= changed <= new
    assert [bytes_of(bank.tensors()) for bank in composed.routing.stack.banks] == banks


def test_the_trained_bank_is_what_was_attached_before_any_training(any_base: Any, compose: Any) -> None:
    composed = compose(any_base, trainable=True)

    bank = trained_bank(composed)

    assert bytes_of(bank.tensors()) == bytes_of(composed.routing.stack.banks[-1].tensors())
    assert bank.experts == composed.routing.stack.banks[-1].experts


def test_the_trained_bank_attached_as_a_frozen_one_gives_the_same_logits(
    any_base: Any, compose: Any, some_ids: Any, logits: Any, train: Any
) -> None:
    composed = compose(any_base, trainable=True).train()
    train(composed)
    expected = logits(composed.eval(), input_ids=some_ids())
    stack = composed.routing.stack
    bank: ExpertBank = trained_bank(composed)

    frozen = Stack(names=stack.names, banks=(*stack.banks[:-1], bank))
    again = attach(any_base, frozen, router=composed.routing.router)

    assert bytes_of(bank.tensors()) != bytes_of(stack.banks[-1].tensors())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(logits(again, input_ids=some_ids()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_gives_the_same_gradients(any_base: Any, compose: Any, some_ids: Any) -> None:
    ids = some_ids(2)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = compose(any_base, trainable=True).train()
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)

    assert plain.keys() == checkpointed.keys()
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in any_base.modules())


def test_training_under_autocast_gives_finite_float32_gradients(any_base: Any, compose: Any, some_ids: Any) -> None:
    composed = compose(any_base, trainable=True).train()

    with torch.autocast("cpu", torch.bfloat16):
        loss = composed(input_ids=some_ids(2), labels=some_ids(2)).loss
    loss.backward()

    gradients = [parameter.grad for parameter in composed.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients)


def test_a_router_of_measured_statistics_trains(any_base: Any, random_stack: Any, some_ids: Any) -> None:
    ids = some_ids(4, 16)
    texts, roles = [(row, [True] * 16) for row in ids.tolist()], TokenRoles(torch.zeros(64, dtype=torch.uint8))
    statistics = measure_statistics(any_base, find_layout(any_base), texts, layer=1, roles=roles)
    router = DomainRouter([statistics, statistics], prior=torch.ones(2), temperatures=Temperatures(), width=32)
    stack = random_stack(any_base, names=("general", "legal"), trainable=True)
    composed: Any = attach(any_base, stack, router=router)

    with recording_routes(composed) as routes:
        composed.train()(input_ids=ids, labels=ids).loss.backward()

    torch.testing.assert_close(routes[0].slot_gate, torch.full((4, 16, 2), 0.5), rtol=0, atol=1e-4)
    assert all(p.grad.abs().max() > 0 for name, p in composed.named_parameters() if name.endswith("new_B"))
