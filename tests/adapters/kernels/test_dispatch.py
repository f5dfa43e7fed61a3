"""Which implementation runs."""

from typing import Any

import pytest
import torch

from lorary.adapters.kernels import eager, reference
from lorary.adapters.kernels.dispatch import choose_kernels, use_kernels
from lorary.domains.errors import InputError

CPU = torch.device("cpu")


def test_a_cpu_takes_the_fast_path_unless_another_is_asked_for() -> None:
    assert choose_kernels(CPU) is eager

    with use_kernels("reference"):
        assert choose_kernels(CPU) is reference
        with use_kernels("eager"):
            assert choose_kernels(CPU) is eager
        assert choose_kernels(CPU) is reference

    assert choose_kernels(CPU) is eager


def test_the_choice_ends_with_an_error() -> None:
    with pytest.raises(KeyError), use_kernels("reference"):
        raise KeyError

    assert choose_kernels(CPU) is eager


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(InputError, match="'fast'"), use_kernels("fast"):
        pass


def test_a_model_gives_the_same_on_the_reference(any_base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(any_base)
    expected = logits(composed, input_ids=some_ids(2))

    with use_kernels("reference"):
        found = logits(composed, input_ids=some_ids(2))

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
