"""The fast path against the reference."""

from typing import Any

import pytest
import torch

from lorary.adapters.kernels import eager


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_outputs_and_gradients_are_those_of_the_reference(
    shape: str, dtype: torch.dtype, contiguous: bool, make_case: Any, agrees_with_reference: Any
) -> None:
    agrees_with_reference(eager, make_case(shape, dtype, contiguous=contiguous))


def test_closed_slots_add_nothing(shape: str, make_case: Any, agrees_with_reference: Any) -> None:
    agrees_with_reference(eager, make_case(shape, torch.float32, empty=True))


def test_what_is_not_wanted_is_not_computed(make_case: Any) -> None:
    case = make_case("three-modules", torch.float32)

    found = eager.gradients(
        case.grads,
        case.x,
        torch.zeros(100, 72),
        case.gates,
        case.weights,
        trainable=[0, 0, 0],
        wants_x=False,
        wants_gates=False,
    )

    assert found.x is None
    assert found.gates is None
    assert [tuple(grad.shape) for grad in (*found.A, *found.Bt)] == [(0, 64)] * 4 + [(0, 16)] * 2
