"""Soft merging: the same function without the experts' cost, on weights of its own, and back again bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.adapters.layer.attach import attach, detach
from lorary.adapters.layer.fused import FusedLinear
from lorary.adapters.layer.merge import merge_experts, merged_weight, unmerge_experts
from lorary.adapters.layer.routing import fixed_slots, routing_of
from lorary.domains.errors import IncompatibleError, InputError

FIXED = torch.tensor([0.2, 0.3, 0.5])


@pytest.fixture
def static(random_stack: Any) -> Any:
    """`static(base)`: three random banks under constant gates."""
    return lambda base: attach(base, random_stack(base, static=True), router=None, fixed=FIXED)


def test_a_merged_model_gives_the_logits_of_the_unmerged_one(
    any_base: Any, static: Any, some_ids: Any, logits: Any, generated: Any, relative_error: Any
) -> None:
    composed = static(any_base)
    expected, text = logits(composed, input_ids=some_ids(2)), generated(composed, input_ids=some_ids())

    assert merge_experts(composed) is composed

    assert relative_error(logits(composed, input_ids=some_ids(2)), expected) <= 1e-5
    assert torch.equal(generated(composed, input_ids=some_ids()), text)


def test_base_and_composition_are_restored_bit_for_bit(
    any_base: Any, static: Any, some_ids: Any, logits: Any, digest: Any
) -> None:
    composed = static(any_base)
    before, plain = logits(composed, input_ids=some_ids()), logits(any_base, input_ids=some_ids())
    bytes_before, modules = digest(any_base), [type(module) for module in composed.modules()]

    merge_experts(composed)
    assert digest(any_base) == bytes_before
    assert torch.equal(logits(any_base, input_ids=some_ids()), plain)
    unmerge_experts(composed)

    assert digest(any_base) == bytes_before
    assert torch.equal(logits(composed, input_ids=some_ids()), before)
    assert [type(module) for module in composed.modules()] == modules
    assert {p.data_ptr() for p in composed.parameters()} == {p.data_ptr() for p in any_base.parameters()}
    assert torch.equal(logits(detach(composed), input_ids=some_ids()), plain)


def test_a_merged_model_runs_modules_of_the_base_and_nothing_else(any_base: Any, static: Any) -> None:
    composed: Any = merge_experts(static(any_base))

    kinds = {type(module) for module in composed.modules()}
    assert FusedLinear not in kinds
    hooks = [hook for module in composed.modules() for hook in module._forward_pre_hooks.values()]
    assert hooks == [composed.base_check]
    merged: list[Any] = [module for path, module in composed.named_modules() if path in composed.merged.modules]
    assert {type(module) for module in merged} == {type(m.base) for m in composed.merged.modules.values()}
    assert composed.merged.extra_bytes == sum(module.weight.nbytes for module in merged)


def test_another_composition_over_the_same_base_sees_nothing_of_it(
    base: Any, static: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    other = compose(base)
    expected = logits(other, input_ids=some_ids())

    merge_experts(static(base))

    assert torch.equal(logits(other, input_ids=some_ids()), expected)


def test_slots_fixed_for_a_while_are_merged_as_they_are(base: Any, static: Any, some_ids: Any, logits: Any) -> None:
    composed = static(base)
    with fixed_slots(composed, {"legal": 1.0}):
        expected = logits(composed, input_ids=some_ids())
        merge_experts(composed)

    torch.testing.assert_close(logits(composed, input_ids=some_ids()), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_rounded_once(make_base: Any, static: Any, some_ids: Any, logits: Any) -> None:
    exact, rounded = static(make_base("llama")), static(make_base("llama", dtype=torch.bfloat16))
    expected = logits(exact, input_ids=some_ids())

    found = logits(merge_experts(rounded), input_ids=some_ids())

    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_merged_weight_is_the_sum_of_products(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    A, Bt = torch.randn(3, 5, generator=generator), torch.randn(3, 4, generator=generator)
    gate, weight = torch.tensor([0.5, 0.0, 2.0]), torch.randn(4, 5, generator=generator)

    found = merged_weight(weight.t() if transposed else weight, A, Bt, gate, transposed=transposed)

    expected = weight + 0.5 * torch.outer(Bt[0], A[0]) + 2 * torch.outer(Bt[2], A[2])
    torch.testing.assert_close(found.t() if transposed else found, expected)


def test_gates_that_depend_on_the_text_cannot_be_merged(base: Any, compose: Any) -> None:
    composed = compose(base)

    with pytest.raises(InputError, match="constant gates"):
        merge_experts(composed)
    with fixed_slots(composed, {"legal": 1.0}), pytest.raises(InputError, match="constant gates"):
        merge_experts(composed)


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused(base: Any, static: Any) -> None:
    composed = static(base)

    with pytest.raises(InputError, match="not merged"):
        unmerge_experts(composed)
    merge_experts(composed)
    with pytest.raises(InputError, match="merged already"):
        merge_experts(composed)


class Reordered(nn.Linear):
    """Falcon's: the bias is added after the product is rounded."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


class Paired(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


def as_another_class(module: Any, kind: type[nn.Linear], *, bias: bool = False) -> nn.Linear:
    changed = kind(module.in_features, module.out_features, bias=bias, dtype=module.weight.dtype)
    changed.weight = module.weight
    return changed.requires_grad_(False)


def in_eight_bits(module: Any) -> nn.Linear:
    changed = as_another_class(module, nn.Linear)
    changed.weight = nn.Parameter((module.weight * 100).to(torch.int8), requires_grad=False)
    return changed


def with_a_hook(module: Any) -> nn.Linear:
    module.register_forward_hook(lambda _module, _args, output: output * 2)
    return module


def with_a_pre_hook(module: Any) -> nn.Linear:
    module.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    return module


def with_another_forward(module: Any) -> nn.Linear:
    changed = as_another_class(module, nn.Linear)
    changed.forward = lambda input: F.linear(input, changed.weight).relu()
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda module: as_another_class(module, Clamped),
        lambda module: as_another_class(module, Paired),
        in_eight_bits,
        with_a_hook,
        with_a_pre_hook,
        with_another_forward,
    ],
)
def test_a_module_of_another_kind_is_refused_before_anything_changes(
    change: Callable[[Any], nn.Linear], base: Any, static: Any, some_ids: Any, logits: Any
) -> None:
    composed = static(base)
    expected = logits(composed, input_ids=some_ids())
    fused = [module for module in composed.modules() if isinstance(module, FusedLinear)][-1]
    plain: Any = fused.base
    fused.base = change(plain)

    with pytest.raises(IncompatibleError, match="cannot be merged") as refusal:
        merge_experts(composed)

    assert type(fused.base).__name__ in str(refusal.value.cause)
    fused.base = plain
    plain._forward_hooks.clear()
    plain._forward_pre_hooks.clear()
    assert torch.equal(logits(composed, input_ids=some_ids()), expected)
    assert routing_of(composed).stack.static


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_that_computes_the_same_in_another_order_is_merged(
    bias: bool, dtype: torch.dtype, make_base: Any, static: Any, some_ids: Any, logits: Any
) -> None:
    base = make_base("llama", dtype=dtype)
    for path, module in list(base.named_modules()):
        if path.endswith(("down_proj", "q_proj")):
            base.set_submodule(path, as_another_class(module, Reordered, bias=bias))
    composed = static(base)
    expected = logits(composed, input_ids=some_ids())

    merge_experts(composed)

    assert sum(isinstance(module, Reordered) for module in composed.modules()) == 8
    close = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (logits(composed, input_ids=some_ids()) - expected).abs().max() < close * expected.abs().max()


def test_an_observing_hook_is_kept_and_called_by_the_merged_module(base: Any, static: Any, some_ids: Any) -> None:
    composed = static(base)
    fused: Any = next(module for module in composed.modules() if isinstance(module, FusedLinear))
    seen: list[int] = []
    fused.base.register_forward_hook(lambda *_: seen.append(1))

    merge_experts(composed)

    seen.clear()
    composed(input_ids=some_ids())
    assert seen == [1]


def test_a_merged_model_is_detached_to_its_base(any_base: Any, static: Any, some_ids: Any, logits: Any) -> None:
    plain = detach(merge_experts(static(any_base)))

    assert torch.equal(logits(plain, input_ids=some_ids()), logits(any_base, input_ids=some_ids()))
    assert [type(module) for module in plain.modules()] == [type(module) for module in any_base.modules()]


def test_slots_of_a_merged_model_cannot_be_fixed_to_something_else(base: Any, static: Any) -> None:
    composed = merge_experts(static(base))

    with pytest.raises(InputError, match="merged"), fixed_slots(composed, {"legal": 1.0}):
        pass
