"""Finding a base model: the pocket base, folders, and models on the Hub."""

from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import NotFoundError, RemoteError
from lorary.registry.base.find import POCKET, find_base


def test_the_pocket_base_is_found() -> None:
    assert (find_base(POCKET) / "model.safetensors").is_file()


def test_a_folder_is_found_by_a_relative_path(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base_folder.parent)

    assert find_base(base_folder.name) == find_base(str(base_folder)) == base_folder.resolve()


@pytest.mark.parametrize("source", ["pockt", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", ""])
def test_neither_a_folder_nor_an_id_is_not_found(source: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        find_base(source)

    assert caught.value.exit_code == 3
    assert caught.value.fix


@pytest.mark.parametrize("source", ["not an/id", "owner/", "/name"])
def test_an_invalid_hub_id_is_not_found(source: str) -> None:
    with pytest.raises(NotFoundError):
        find_base(source)


def test_a_model_missing_on_the_hub_is_not_found(local_hub: Any) -> None:
    with pytest.raises(NotFoundError, match="nobody/nothing") as caught:
        find_base("nobody/nothing")

    assert "hf auth login" in str(caught.value.fix)


def test_offline_mode_is_not_reported_as_a_missing_model() -> None:
    with pytest.raises(RemoteError) as caught:
        find_base("nobody/nothing")

    assert caught.value.fix == "unset HF_HUB_OFFLINE, and repeat the command"


def test_an_unreachable_hub_is_not_reported_as_a_missing_model(local_hub: Any) -> None:
    local_hub.fault("GET ", "drop", times=99)

    with pytest.raises(RemoteError, match="cannot be reached"):
        find_base("nobody/nothing")
