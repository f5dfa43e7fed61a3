"""The shape of a new bank: what cannot be is refused before anything is computed."""

from typing import Any

import pytest

from lorary.adapters.config import BankConfig, lora_scale
from lorary.domains.errors import InputError


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"experts": -1.0},
        {"experts": float("nan")},
        {"experts": float("inf")},
        {"method": "dora"},
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused_by_name(change: dict[str, Any]) -> None:
    [value] = change.values()

    with pytest.raises(InputError, match=str(value)):
        BankConfig(**change)


def test_scales_are_those_of_the_papers() -> None:
    assert lora_scale(8.0, 4, "lora") == 2.0
    assert lora_scale(8.0, 4, "rslora") == 4.0
