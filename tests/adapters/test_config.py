"""BankConfig and TrainingConfig: invalid values are refused, derived values follow their formulas."""

from typing import Any

import pytest

from lorary.adapters.config import BankConfig, TrainingConfig, lora_scale
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
def test_an_invalid_bank_setting_is_refused_by_name(change: dict[str, Any]) -> None:
    [value] = change.values()

    with pytest.raises(InputError, match=str(value)):
        BankConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0.0},
        {"block": 0},
        {"block": 1},
        {"batch": 0},
        {"batch": -1},
        {"accumulation": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"epochs": float("nan")},
        {"steps": 0},
        {"least_steps": 0},
        {"most_steps": 0},
        {"checkpoint_every": 0},
        *({"seed": seed} for seed in (-1, 2**32)),
        *({"warmup": share} for share in (-0.1, 1.5)),
        {"balance": -1.0},
        {"balance": float("nan")},
    ],
    ids=str,
)
def test_an_invalid_training_setting_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        TrainingConfig(**change)

    assert caught.value.exit_code == 2
    assert next(iter(change)) in caught.value.message


@pytest.mark.parametrize(
    ("settings", "blocks", "steps"),
    [
        ({"steps": 7}, 10_000, 7),
        ({}, 0, 40),
        ({}, 200, 100),
        ({"accumulation": 2}, 200, 50),
        ({}, 100_000, 1000),
        ({"epochs": 0.5}, 1000, 62),
    ],
    ids=str,
)
def test_steps_follow_the_data_between_two_bounds(settings: dict[str, Any], blocks: int, steps: int) -> None:
    assert TrainingConfig(**settings).planned_steps(blocks) == steps


def test_an_unset_learning_rate_follows_the_width() -> None:
    rates = [TrainingConfig().for_width(width).learning_rate for width in (192, 4096)]

    assert rates == pytest.approx([2 / 192, 2 / 4096])
    assert TrainingConfig(learning_rate=0.1).for_width(192).learning_rate == 0.1


def test_scales_are_those_of_the_papers() -> None:
    assert lora_scale(8.0, 4, "lora") == 2.0
    assert lora_scale(8.0, 4, "rslora") == 4.0
