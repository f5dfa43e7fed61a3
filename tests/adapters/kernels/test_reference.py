"""The reference against autograd through the formula, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.kernels import reference
from lorary.adapters.kernels.group import GroupWeights


def test_outputs_and_gradients_are_those_of_the_formula(shape: str, make_case: Any, relative_error: Any) -> None:
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
        wants_x=True,
        wants_gates=True,
    )

    def close(mine: Any, theirs: Tensor | None) -> None:
        assert relative_error(mine, theirs) <= 1e-5

    for output, y in zip(case.outputs, wanted, strict=True):
        close(output, y)
    close(found.x, x.grad)
    close(found.gates, gates.grad)
    close(torch.cat(found.A), A.grad)
    for mine, theirs in zip(found.Bt, Bt, strict=True):
        close(mine, theirs.grad)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens_or_some_are_the_same_to_it(rows: int, make_case: Any) -> None:
    case = make_case("odd-sizes", torch.float32)

    low = reference.update_(case.x[:rows], [y[:rows] for y in case.outputs], case.gates[:rows], case.weights, keep=True)

    assert low is not None
    assert low.shape == (rows, 26)
