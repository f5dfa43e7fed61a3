"""verify reads every byte again, and names damaged, missing and inconsistent files."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.registry import Registry
from lorary.registry.maintenance.verify import FileCheck, verify_store, verify_version
from lorary.registry.store.strict_json import canonical_json, parse_json

OWN = "router/router.safetensors"  # a file that no other version shares


@pytest.fixture
def registry(both_store: Path, fresh_copy: Callable[[Path], Registry]) -> Registry:
    """KP, `cooking` and `sailing`; tests may damage it."""
    return fresh_copy(both_store)


def problems(found: Any) -> list[tuple[str, str, str]]:
    return [(one.reference, one.path, one.state) for one in found if one.state != "ok"]


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(change(data))


def test_every_file_of_an_intact_store_is_ok(registry: Registry) -> None:
    found = list(verify_store(registry.store, deep=True))

    assert problems(found) == []
    manifests = registry.list()
    expected = {(f"{m.name}@1", p) for m in manifests for p in ["lorary.json", "(pack)", *(f.path for f in m.files)]}
    assert {(one.reference, one.path) for one in found} == expected
    assert sum(one.size for one in found) > 10_000


@pytest.mark.parametrize(
    "change",
    [
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
)
def test_a_damaged_blob_is_found(change: Any, registry: Registry) -> None:
    file = registry.show("cooking").file(OWN)
    damage(registry.store.blobs.path(file.sha256), change)

    assert problems(verify_version(registry.store, "cooking", 1)) == [("cooking@1", OWN, "bad")]
    assert problems(verify_version(registry.store, "sailing", 1)) == []


def test_bit_rot_anywhere_is_found(registry: Registry) -> None:
    draw = random.Random(0)
    digests = list(registry.store.blobs.all())
    for digest in draw.sample(digests, 12):
        path = registry.store.blobs.path(digest)
        data = path.read_bytes()
        at = draw.randrange(len(data))
        damage(path, lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])

        assert len(problems(verify_store(registry.store))) >= 1, digest

        damage(path, lambda _damaged, data=data: data)
    assert problems(verify_store(registry.store)) == []


def test_a_missing_blob_is_distinguished_from_a_damaged_one(registry: Registry) -> None:
    file = registry.show("cooking").file(OWN)
    os.unlink(registry.store.blobs.path(file.sha256))

    assert problems(verify_store(registry.store)) == [("cooking@1", OWN, "missing")]


def test_a_damaged_manifest_does_not_hide_the_other_versions(registry: Registry) -> None:
    damage(registry.store.path / "domains" / "cooking" / "1.json", lambda data: data[:100])

    found = list(verify_store(registry.store))

    assert problems(found) == [("cooking@1", "lorary.json", "bad")]
    assert any(one.name == "sailing" for one in found)


def test_only_deep_finds_an_inconsistent_pack(registry: Registry, rewrite: Any) -> None:
    path = "experts/e0/adapter_config.json"
    rewrite(
        registry.store,
        "cooking",
        path,
        lambda data: canonical_json(parse_json(data, source="x") | {"lora_alpha": 800.0}),
    )

    assert problems(verify_store(registry.store)) == []
    (found,) = [one for one in verify_store(registry.store, deep=True) if one.state != "ok"]
    assert (found.path, found.state) == ("(pack)", "bad")
    assert "lora_alpha" in found.problem


def test_dangling_and_malformed_aliases_are_found(registry: Registry) -> None:
    aliases = registry.store.path / "domains" / "cooking" / "aliases"
    (aliases / "production").write_text("7\n", encoding="utf-8")
    (registry.store.path / "domains" / "sailing" / "aliases" / "latest").write_text("new\n", encoding="utf-8")

    assert problems(verify_store(registry.store)) == [
        ("cooking", "aliases/production", "bad"),
        ("sailing", "aliases/latest", "bad"),
    ]


def test_removed_versions_are_not_checked(registry: Registry) -> None:
    registry.store.remove("cooking@1")

    assert "cooking" not in {one.name for one in verify_store(registry.store)}
    assert FileCheck(name="a", version=1, path="x", state="ok").reference == "a@1"
