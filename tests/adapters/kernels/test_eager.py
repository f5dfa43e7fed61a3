"""The eager implementation against the reference."""

from typing import Any

import pytest
import torch

from lorary.adapters.kernels import eager


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_outputs_and_gradients_match_the_reference(
    shape: str, dtype: torch.dtype, contiguous: bool, make_case: Any, agrees_with_reference: Any
) -> None:
    agrees_with_reference(eager, make_case(shape, dtype, contiguous=contiguous))


def test_gates_of_zero_add_nothing(shape: str, make_case: Any, agrees_with_reference: Any) -> None:
    agrees_with_reference(eager, make_case(shape, torch.float32, empty=True))


def test_gradients_that_are_not_needed_are_not_computed(make_case: Any) -> None:
    case = make_case("three-modules", torch.float32)

    found = eager.gradients(
        case.grads,
        case.x,
        torch.zeros(100, 72),
        case.gates,
        case.weights,
        trainable=[0, 0, 0],
        needs_x_grad=False,
        needs_gates_grad=False,
    )

    assert found.x is None
    assert found.gates is None
    assert [tuple(grad.shape) for grad in (*found.A, *found.Bt)] == [(0, 64)] * 4 + [(0, 16)] * 2
