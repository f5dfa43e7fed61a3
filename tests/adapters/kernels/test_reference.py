"""The reference against autograd through the formula, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.kernels import reference
from lorary.adapters.kernels.group import GroupWeights


def test_outputs_and_gradients_match_autograd_in_float64(shape: str, make_case: Any, relative_error: Any) -> None:
    case = make_case(shape, torch.float32)
    x, gates, A, *Bt = (
        tensor.double().requires_grad_() for tensor in (case.x, case.gates, case.weights.A, *case.weights.Bt)
    )
    exact = GroupWeights(A=A, Bt=tuple(Bt), columns=case.weights.columns)
    wanted = [
        output.double() + (gate * (x @ A.T)) @ Bt
        for output, (A, Bt, gate) in zip(case.outputs, reference.modules(exact, gates), strict=True)
    ]
    sum((y * grad.double()).sum() for y, grad in zip(wanted, case.grads, strict=True)).backward()  # type: ignore

    low: Any = reference.update_(case.x, case.outputs, case.gates, case.weights, keep=True)
    found = reference.gradients(
        case.grads,
        case.x,
        low,
        case.gates,
        case.weights,
        trainable=case.weights.ranks,
        needs_x_grad=True,
        needs_gates_grad=True,
    )

    def assert_close(actual: Any, wanted: Tensor | None) -> None:
        assert relative_error(actual, wanted) <= 1e-5

    for output, y in zip(case.outputs, wanted, strict=True):
        assert_close(output, y)
    assert_close(found.x, x.grad)
    assert_close(found.gates, gates.grad)
    assert_close(torch.cat(found.A), A.grad)
    for grad, parameter in zip(found.Bt, Bt, strict=True):
        assert_close(grad, parameter.grad)


@pytest.mark.parametrize("rows", [0, 3])
def test_any_number_of_tokens_is_accepted(rows: int, make_case: Any) -> None:
    case = make_case("odd-sizes", torch.float32)

    low = reference.update_(case.x[:rows], [y[:rows] for y in case.outputs], case.gates[:rows], case.weights, keep=True)

    assert low is not None
    assert low.shape == (rows, 26)
