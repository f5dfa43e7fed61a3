"""A gated MLP keeps less and computes the same: outputs, gradients, and the model that is left when it is taken off."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2FN

from lorary.adapters.layer import attach as attach_module
from lorary.adapters.layer.attach import detach
from lorary.adapters.layer.gated_mlp import GatedMLP, gated_mlps, gated_product

GATED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")


@pytest.fixture
def kept_bytes() -> Callable[[Callable[[], Any]], int]:
    """`kept_bytes(run)`: what autograd keeps for the backward pass, parameters left out."""

    def count(run: Callable[[], Any]) -> int:
        kept: dict[int, tuple[int, Tensor]] = {}  # the tensor is held so that its memory is not used again

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(size for size, _ in kept.values())

    return count


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, compose: Any) -> Callable[..., Any]:
    """`without(base)`: the composed model as it was before there were gated MLPs."""

    def make(base: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(attach_module, "gated_mlps", lambda _layer: [])
            return compose(base, **options)

    return make


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of one training step."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("all_targets", [True, False], ids=["all targets", "some targets"])
def test_loss_and_gradients_are_those_of_the_ordinary_mlp_bit_for_bit(
    family: str, all_targets: bool, make_base: Any, compose: Any, without: Any, some_ids: Any
) -> None:
    base = make_base(family)
    models = [make(base, trainable=True, all_targets=all_targets).train() for make in (without, compose)]

    expected, found = (step(model, some_ids(2)) for model in models)

    assert not any(isinstance(module, GatedMLP) for module in models[0].modules())
    assert sum(isinstance(module, GatedMLP) for module in models[1].modules()) == 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_activation_and_product_are_not_kept(
    base: Any, compose: Any, without: Any, some_ids: Any, kept_bytes: Any
) -> None:
    ids = some_ids(2)
    before, after = (make(base, trainable=True, all_targets=True).train() for make in (without, compose))

    saved = kept_bytes(lambda: step(before, ids)) - kept_bytes(lambda: step(after, ids))

    inner, layers = ids.numel() * base.config.intermediate_size * 4, 3
    assert saved == 2 * layers * inner


def test_two_backward_passes_of_one_graph_give_the_same(base: Any, compose: Any, some_ids: Any) -> None:
    model = compose(base, trainable=True, all_targets=True).train()
    loss = model(input_ids=some_ids(2), labels=some_ids(2), use_cache=False).loss
    parameters = [p for p in model.parameters() if p.requires_grad]

    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu2", "quick_gelu"])
def test_a_gated_product_has_the_gradients_of_its_formula(act: str) -> None:
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()

    assert torch.autograd.gradcheck(lambda g, u: gated_product(ACT2FN[act], g, u), (gate, up))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi"])
def test_other_mlps_are_left_as_they_are(family: str, make_base: Any, compose: Any) -> None:
    model = compose(make_base(family), trainable=True)

    assert not any(isinstance(module, GatedMLP) for module in model.modules())


def test_an_mlp_is_judged_by_what_it_computes(base: Any) -> None:
    layer = base.model.layers[0]
    same, other, random, listened = (copy.deepcopy(layer) for _ in range(4))

    class Other(type(layer.mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Random(type(layer.mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))

    other.mlp.__class__, random.mlp.__class__ = Other, Random
    listened.mlp.act_fn.register_forward_hook(lambda *_: None)

    assert [path for path, _ in gated_mlps(same)] == ["mlp"]
    assert not same.mlp.training
    assert not [*gated_mlps(other), *gated_mlps(random), *gated_mlps(listened)]


def test_a_model_that_does_not_train_keeps_its_own_mlps(base: Any, compose: Any) -> None:
    assert not any(isinstance(module, GatedMLP) for module in compose(base).modules())


def test_detaching_puts_the_mlps_back(base: Any, compose: Any, logits: Any, some_ids: Any) -> None:
    model = detach(compose(base, trainable=True, all_targets=True).train())

    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval(), input_ids=some_ids()), logits(base, input_ids=some_ids()))


def test_a_copy_trains_by_itself(base: Any, compose: Any, some_ids: Any) -> None:
    model = compose(base, trainable=True, all_targets=True).train()
    copied = copy.deepcopy(model)

    expected, found = step(model, some_ids(2)), step(copied, some_ids(2))

    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert copied.model.layers[1].mlp.original.gate_proj is copied.model.layers[1].mlp.gate_proj.base
