"""Linear modules of all kinds: which they are, their logical shapes, and a state that no forward pass changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorary.domains.linear import hidden_tensors, is_linear, is_quantised, linear_modules, linear_shape, settle


class Packed(nn.Module):
    """As GPTQ and AWQ store a matrix: integers and scales in buffers, no weight."""

    qweight: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(0, 9, (out_features, in_features), dtype=torch.int32))
        self.register_buffer("scales", torch.ones(out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).t()


class Lazy(nn.Linear):
    """As bitsandbytes does: the first call moves the weight into a state object."""

    class State:
        matrix: Tensor | None = None

    def __init__(self) -> None:
        super().__init__(4, 6, bias=False)
        self.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
        self.state = Lazy.State()
        self.support_avx512bf16_for_cpu = True

    def forward(self, input: Tensor) -> Tensor:
        if self.state.matrix is None:
            self.state.matrix = self.weight.clone()
        return input @ self.state.matrix.to(input.dtype).t()


class Routed(nn.Module):
    """No linear module: it has the sizes, but no matrix of integers."""

    in_features, out_features = 4, 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))


class Holder(nn.Module):
    """No linear module: its child is one."""

    in_features, out_features = 4, 6

    def __init__(self) -> None:
        super().__init__()
        self.inner = Packed(4, 6)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("module", "is_one", "stores_integers"),
    [
        (nn.Linear(4, 6), True, False),
        (nn.Linear(4, 6, dtype=torch.bfloat16), True, False),
        (Conv1D(6, 4), True, False),
        (Packed(4, 6), True, True),
        (Lazy(), True, True),
        (Routed(), False, False),
        (Holder(), False, False),
        (nn.Embedding(4, 6), False, False),
        (nn.LayerNorm(4), False, False),
    ],
)
def test_a_linear_module_is_told_with_its_shape(module: nn.Module, is_one: bool, stores_integers: bool) -> None:
    assert is_linear(module) is is_one
    assert is_quantised(module) is stores_integers
    if is_one:
        assert linear_shape(module) == (4, 6)


def test_linear_modules_are_found_by_path_in_order() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Holder(), "c": Lazy(), "d": nn.Embedding(2, 2)})

    assert linear_modules(model) == ["a", "b.inner", "c"]


def test_tensors_of_buffers_and_state_objects_are_found() -> None:
    packed, lazy = Packed(4, 6), Lazy()
    lazy(torch.zeros(1, 4))

    assert {id(tensor) for tensor in hidden_tensors(packed)} >= {id(packed.qweight), id(packed.scales)}
    assert id(lazy.state.matrix) in {id(tensor) for tensor in hidden_tensors(lazy)}


def test_a_settled_model_is_not_changed_by_a_forward_pass() -> None:
    model: Any = nn.Sequential(Lazy(), nn.Linear(6, 6))

    settle(model)

    before = model[0].state.matrix
    assert before is not None
    assert model[0].support_avx512bf16_for_cpu is False
    model(torch.zeros(2, 4))
    assert model[0].state.matrix is before
