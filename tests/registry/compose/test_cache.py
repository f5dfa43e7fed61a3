"""Cached compositions: the same model from one file, never a stale or damaged one."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.registry import Registry
from lorary.registry.compose import cache as module
from lorary.registry.compose.build import compose_model
from lorary.registry.compose.cache import CompositionCache


def cached_files(registry: Registry) -> list[Path]:
    return sorted((registry.store.cache / "compositions").glob("*"))


def no_packs(*_args: Any) -> None:
    raise AssertionError("a pack was read")


@pytest.mark.parametrize("static", [False, True], ids=["routed", "static"])
def test_a_composition_from_the_cache_is_the_same_without_its_packs(
    static: bool, both_store: Path, fresh_copy: Any, logits_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fresh_copy(both_store)
    first = registry.compose("cooking+sailing", static=static)
    monkeypatch.setattr("lorary.registry.compose.build.read_pack", no_packs)

    again = Registry.open(registry.store.path).compose("cooking+sailing", static=static)

    assert torch.equal(logits_of(again), logits_of(first))
    assert len(cached_files(registry)) == 1


def test_every_part_of_a_router_is_cached(both_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(both_store)
    first, again = (registry.compose("cooking+sailing").routing.router for _ in range(2))

    assert first.__dict__.keys() == again.__dict__.keys()
    assert {k: v for k, v in first.__dict__.items() if not k.startswith("_")} == {
        k: v for k, v in again.__dict__.items() if not k.startswith("_")
    }
    for name, tensor in first.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_everything_that_determines_the_content_is_part_of_the_key(both_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(both_store)
    cache = CompositionCache(registry.store.cache)
    plans = [registry.plan(text) for text in ("cooking", "cooking+sailing", "cooking:0.9+sailing:0.1")]
    plans.append(registry.plan("cooking+sailing", static=True))

    paths = {cache.path(plan, dtype) for plan in plans for dtype in (torch.float32, torch.bfloat16)}

    assert len(paths) == 8
    assert cache.path(registry.plan("cooking@1+sailing@1"), torch.float32) in paths  # the same versions, spelled out


@pytest.mark.parametrize("place", [0.02, 0.5, 0.97], ids=["header", "middle", "end"])
def test_a_damaged_file_is_detected_deleted_and_rebuilt(
    place: float, both_store: Path, fresh_copy: Any, logits_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    registry = fresh_copy(both_store)
    expected = logits_of(registry.compose("cooking"))
    (file,) = cached_files(registry)
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(len(bad) * place)] ^= 4
    file.write_bytes(bytes(bad))

    with caplog.at_level(logging.WARNING):
        again = registry.compose("cooking")

    assert "damaged" in caplog.text
    assert torch.equal(logits_of(again), expected)
    assert cached_files(registry)[0].read_bytes() == good


def test_a_truncated_file_is_rebuilt(both_store: Path, fresh_copy: Any, logits_of: Any) -> None:
    registry = fresh_copy(both_store)
    expected = logits_of(registry.compose("cooking"))
    (file,) = cached_files(registry)
    file.write_bytes(file.read_bytes()[:-100])

    assert torch.equal(logits_of(registry.compose("cooking")), expected)


def test_a_new_version_never_uses_the_file_of_the_old_one(
    both_store: Path, fresh_copy: Any, rewrite: Any, logits_of: Any
) -> None:
    registry = fresh_copy(both_store)
    before = logits_of(registry.compose("cooking"))
    manifest = registry.store.manifest("cooking")
    path = next(file.path for file in manifest.files if file.path.startswith("experts/") and "safetensors" in file.path)

    def louder(data: bytes) -> bytes:
        from safetensors.torch import load, save

        return save({name: tensor * 3 for name, tensor in load(data).items()})

    rewrite(registry.store, "cooking", path, louder)

    assert not torch.equal(logits_of(registry.compose("cooking")), before)
    assert len(cached_files(registry)) == 2


def test_a_read_only_store_composes_without_caching(
    both_store: Path, fresh_copy: Any, logits_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fresh_copy(both_store)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))

    model = compose_model(registry.store, registry.plan("cooking"), registry.base)

    assert cached_files(registry) == []
    assert logits_of(model).isfinite().all()


def test_the_least_recently_used_files_are_evicted_first(
    both_store: Path, fresh_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 2)
    registry = fresh_copy(both_store)
    cache = CompositionCache(registry.store.cache)
    for age, text in enumerate(("cooking", "sailing")):
        registry.compose(text)
        os.utime(cache.path(registry.plan(text), torch.float32), (age, age))
    registry.compose("cooking")  # the most recently used one

    registry.compose("cooking+sailing")

    left = [cache.path(registry.plan(text), torch.float32) for text in ("cooking", "cooking+sailing")]
    assert cached_files(registry) == sorted(left)


def test_another_process_may_evict_files_meanwhile(
    both_store: Path, fresh_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fresh_copy(both_store)
    registry.compose("cooking")
    folder = registry.store.cache / "compositions"
    (folder / "gone.safetensors").symlink_to(folder / "gone")  # listed, but missing when its status is read

    def touch(path: Path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(module, "touch", touch)

    registry.compose("cooking")
    registry.compose("sailing")

    assert len(cached_files(registry)) == 3


def test_another_routing_method_is_another_file(
    both_store: Path, fresh_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fresh_copy(both_store)
    registry.compose("cooking")
    monkeypatch.setattr(module, "METHOD", module.METHOD + 1)

    registry.compose("cooking")

    assert len(cached_files(registry)) == 2


def test_the_cache_may_be_deleted_at_any_time(both_store: Path, fresh_copy: Any, logits_of: Any) -> None:
    registry = fresh_copy(both_store)
    model = registry.compose("cooking")
    (file,) = cached_files(registry)
    twin = registry.compose("cooking")

    file.unlink()

    assert torch.equal(logits_of(twin), logits_of(model))
    assert torch.equal(logits_of(registry.compose("cooking")), logits_of(model))
