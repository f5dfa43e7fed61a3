"""What stands around a call changes nothing that is stored."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.registry import Registry

STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def digests(registry: Registry, name: str) -> dict[str, str]:
    return {file.path: file.sha256 for file in registry.show(name).files}


@pytest.fixture(scope="module")
def learned(kp_store: Path, texts: Any, short_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = Path(shutil.copytree(kp_store, tmp_path_factory.mktemp("usual") / "store"))
    registry = Registry.open(store)
    registry.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=2))
    return digests(registry, "cooking")


@pytest.mark.own_failure(
    "learning inside `torch.autocast`, `no_grad` or `inference_mode`",
    before="another pack, or an error of autograd",
    now="the same bytes as outside",
)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_learning_stores_the_same_bytes(
    state: Callable, kp_store: Path, learned: dict, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(kp_store, tmp_path / "store"))
    registry = Registry.open(store)

    with state():
        model = registry.compose("general")  # loads the base model
        registry.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=2))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == (
            state is not torch.no_grad and state is not torch.inference_mode,
            state is torch.inference_mode,
            state is STATES["autocast"],
        )

    assert digests(registry, "cooking") == learned
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_init_and_scores_are_the_same(
    state: Callable, base_folder: Path, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    begin: Any = {"base": str(base_folder), "data": [texts["general"]], **short_run(steps=2)}
    usual = Registry.init(tmp_path / "usual", **begin)
    usual.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=2))

    with state():
        other = Registry.init(tmp_path / "other", **begin)
        other.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=2))
        scores = other.evaluate("cooking")

    assert digests(other, "general") == digests(usual, "general")
    assert scores == usual.evaluate("cooking")
