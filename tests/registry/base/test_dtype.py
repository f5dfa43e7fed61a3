"""The dtype of a base model: what is asked for, what the registry was made with, or what this CPU is fast in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.domains.errors import ConflictError, InputError
from lorary.registry import Registry
from lorary.registry.base import dtype as of_dtype
from lorary.registry.base.dtype import CACHE_FILE, ChosenDtype, choose_dtype, keep_speedup, measure_speedup
from lorary.registry.base.find import POCKET
from lorary.registry.base.fingerprint import fingerprint
from lorary.registry.store.manifest import BaseRecord

FAST, SLOW = 2.5, 1.2


@pytest.fixture(scope="module")
def half_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any):
    """The tiny base model, stored in bfloat16."""
    folder = Path(shutil.copytree(base_folder, tmp_path_factory.mktemp("half") / "base"))
    tiny_llama(vocab_size=len(tiny_tokenizer)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half(half_folder: Path) -> BaseRecord:
    return fingerprint(half_folder, source=str(half_folder))


def write_speedup(cache: Path, speedup: Any) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    text = json.dumps({of_dtype._machine(): {"bfloat16_speedup": speedup}, "another machine": {}})
    (cache / CACHE_FILE).write_text(text, encoding="utf-8")


def never() -> Path:
    raise AssertionError("nothing has to be measured here")


# --- the choice ---


@pytest.mark.parametrize("speedup", [FAST, SLOW])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("pinned", [None, "auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_a_pinned_dtype_wins_and_speed_decides_the_rest(
    asked: str, pinned: str | None, device: str, speedup: float, half: BaseRecord, tmp_path: Path
) -> None:
    write_speedup(tmp_path, speedup)
    of_cpu = "bfloat16" if speedup == FAST else "float32"
    expected = next(
        (name for name in (asked, pinned) if name not in (None, "auto")), of_cpu if device == "cpu" else "auto"
    )

    chosen = choose_dtype(asked, pinned=pinned, device=device, record=half, folder=never, cache=tmp_path)

    assert chosen.name == expected


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"dtype": "float16"}, {"quantization": "bitsandbytes nf4"}, {"id": POCKET}],
)
def test_other_bases_stay_in_float32_without_a_measurement(changes: dict, half: BaseRecord, tmp_path: Path) -> None:
    record = replace(half, **changes)

    chosen = choose_dtype("auto", pinned=None, device="cpu", record=record, folder=never, cache=tmp_path)

    assert (chosen.name, chosen.speedup) == ("float32", None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', None, 0, -1, "fast", True])
def test_what_was_not_measured_here_is_measured_and_kept_once(
    text: Any, half: BaseRecord, half_folder: Path, tmp_path: Path
) -> None:
    write_speedup(tmp_path, text)
    if isinstance(text, str):
        (tmp_path / CACHE_FILE).write_text(text, encoding="utf-8")

    first = choose_dtype("auto", pinned=None, device="cpu", record=half, folder=lambda: half_folder, cache=tmp_path)
    keep_speedup(tmp_path, first)
    again = choose_dtype("auto", pinned=None, device="cpu", record=half, folder=never, cache=tmp_path)

    assert first.speedup is not None
    assert again.speedup == pytest.approx(first.speedup, abs=1e-3)


def test_measuring_needs_no_config(half: BaseRecord, tmp_path: Path) -> None:
    assert choose_dtype("auto", pinned=None, device="cpu", record=half, folder=lambda: tmp_path, cache=tmp_path).speedup


def test_a_measurement_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()

    assert 0 < measure_speedup(32) < 100

    assert torch.equal(torch.get_rng_state(), before)


def test_measurements_of_other_machines_stay(tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_text('{"another machine": {"bfloat16_speedup": 9}}', encoding="utf-8")

    keep_speedup(tmp_path, ChosenDtype("bfloat16", "fast", FAST))
    keep_speedup(tmp_path, ChosenDtype("float32", "slow", SLOW))  # what was chosen first stays

    kept = json.loads((tmp_path / CACHE_FILE).read_text(encoding="utf-8"))
    assert kept == {"another machine": {"bfloat16_speedup": 9}, of_dtype._machine(): {"bfloat16_speedup": FAST}}


# --- in a registry ---


@pytest.mark.parametrize("dtype", ["foo", "", "float64", "int8", "torch.bfloat16"])
def test_no_dtype_is_refused_before_anything_is_written(dtype: str, half_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dtype") as caught:
        Registry.init(tmp_path / "store", base=str(half_folder), dtype=dtype)

    assert "bfloat16" in str(caught.value.fix)
    assert not (tmp_path / "store").exists()


def test_the_choice_of_a_machine_is_kept_and_the_manifest_has_what_was_trained_in(
    half_folder: Path, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    path = tmp_path / "store"
    write_speedup(path / "cache", FAST)
    made = Registry.init(path, base=str(half_folder), data=[texts["general"]], **short_run(steps=1))

    assert made.base.model.dtype == torch.bfloat16
    assert made.show("general").train["dtype"] == "bfloat16"
    assert "dtype" not in made.store.settings
    again = Registry.open(path)
    assert again.base_dtype == made.base_dtype
    assert again.base.model.dtype == torch.bfloat16

    write_speedup(path / "cache", SLOW)
    slow, pinned = Registry.open(path), Registry.open(path, dtype="bfloat16")
    assert (slow.base.model.dtype, pinned.base.model.dtype) == (torch.float32, torch.bfloat16)
    added = slow.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=1)).manifest
    assert added.train["dtype"] == "float32"
    assert "bfloat16_speedup" not in str(added)


def test_a_dtype_that_was_asked_for_is_remembered(
    half_folder: Path, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    path, data = tmp_path / "store", [texts["general"]]
    write_speedup(path / "cache", FAST)
    begin: Any = {"base": str(half_folder), **short_run(steps=1)}
    with pytest.raises(InputError):  # an unfinished registry
        Registry.init(path, dtype="float32", data=[{"text": ""}], **begin)
    with pytest.raises(ConflictError):
        Registry.init(path, dtype="float16", data=data, **begin)

    Registry.init(path, data=data, **begin)

    registry = Registry.open(path)
    assert registry.base_dtype.name == registry.show("general").train["dtype"] == "float32"


@pytest.mark.slow
def test_a_merged_export_is_rounded_only_if_that_is_asked_for(
    half_folder: Path, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    path = tmp_path / "store"
    write_speedup(path / "cache", FAST)
    registry = Registry.init(path, base=str(half_folder), data=[texts["general"]], **short_run(steps=1))

    numbers = {}
    for dtype in ("auto", "bfloat16"):
        asked = Registry.open(path, dtype=dtype)
        numbers[dtype] = asked.export("general", tmp_path / dtype, to="merged", static=True).facts["numbers"]

    assert registry.base_dtype.name == "bfloat16"
    assert numbers == {"auto": "float32", "bfloat16": "bfloat16"}
