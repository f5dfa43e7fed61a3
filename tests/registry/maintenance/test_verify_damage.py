"""Every single damage in a small file of a store is reported, and hides nothing else."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import IntegrityError
from lorary.registry.maintenance.log import version_log
from lorary.registry.maintenance.verify import check_small_files, seal_store, unsealed_files, verify_store
from lorary.registry.store.seals import FOLDER, write_sealed
from lorary.registry.store.store import Store
from lorary.registry.store.strict_json import canonical_json

FILES = {"a.safetensors": (b"tensors", "adapter")}


@pytest.fixture
def store(tmp_path: Path, draft: Any) -> Store:
    """A store with a small file of every kind."""
    store = Store.create(tmp_path / "store", {"base": "pocket"})
    for _ in range(3):
        store.commit(draft, FILES)
    store.commit(replace(draft, name="tax"), FILES)
    store.set_alias("legal", "production", 1)
    store.remove("legal@2")
    run = store.runs / "legal-0"
    run.mkdir()
    write_sealed(run / "run.json", canonical_json({"name": "legal", "sources": ["a.jsonl"], "state": "done"}))
    write_sealed(run / "rare.safetensors", b"tokens that a text has once")
    origins = store.path / "domains" / "legal" / "origins"
    origins.mkdir()
    write_sealed(origins / "1.json", canonical_json({"schema": "lorary.origins/1", "origins": []}))
    return store


def small_files(store: Store) -> list[Path]:
    folders = [store.path / "store.json", *(store.path / "domains").rglob("*"), *store.runs.rglob("*")]
    return sorted(path for path in folders if path.is_file() and path.parent.name != FOLDER)


def damages(data: bytes) -> Iterator[Callable[[random.Random], bytes]]:
    """For each byte: one other bit, another byte, lost, doubled, or zeros from there on."""
    for at in range(len(data)):
        head, byte, tail = data[:at], data[at], data[at + 1 :]
        yield lambda _draw, parts=(head, byte, tail): parts[0] + parts[2]
        yield lambda _draw, parts=(head, byte, tail): parts[0] + bytes([parts[1]]) * 2 + parts[2]
        yield lambda _draw, parts=(head, byte, tail): parts[0] + bytes(1 + len(parts[2]))
        yield lambda _draw, parts=(head, byte, tail): parts[0]
        yield lambda draw, parts=(head, byte, tail): parts[0] + bytes([parts[1] ^ 1 << draw.randrange(8)]) + parts[2]
        yield lambda draw, parts=(head, byte, tail): parts[0] + bytes([parts[1] ^ draw.randrange(1, 256)]) + parts[2]


def check_damages(store: Store, count: int | None) -> None:
    draw = random.Random(14)
    whole = {path: path.read_bytes() for path in small_files(store)}
    assert len(whole) == 12
    every = [(path, change) for path, data in whole.items() for change in damages(data)]
    missed = []
    for path, change in every if count is None else draw.sample(every, count):
        data = change(draw)
        if data == whole[path]:  # a byte that was zero, or two equal ones
            continue
        path.chmod(0o644)
        path.write_bytes(data)
        if not list(check_small_files(store)):
            missed.append((path, data))
        path.write_bytes(whole[path])
    assert missed == []
    assert list(check_small_files(store)) == []


def test_every_damage_of_a_small_file_is_reported(store: Store) -> None:
    check_damages(store, 300)


@pytest.mark.nightly
def test_every_damage_of_every_byte_is_reported(store: Store) -> None:
    check_damages(store, None)


def test_the_whole_verification_reports_what_is_damaged_once(store: Store) -> None:
    for path in small_files(store):
        if path.name != "store.json":
            path.write_bytes(path.read_bytes()[:-2] + b"x\n")

    found = [(one.reference, one.path) for one in verify_store(store) if one.state != "ok"]

    assert len(found) == len(set(found)) == 11
    assert ("legal@2", "lorary.json") in found  # removed, and its number is never used again
    assert ("runs", "legal-0/rare.safetensors") in found


# --- files without seals, as older programs wrote them ---


@pytest.fixture
def older(store: Store) -> Store:
    for folder in list(store.path.rglob(FOLDER)):
        for seal in folder.iterdir():
            seal.unlink()
        folder.rmdir()
    return store


def test_a_store_without_seals_is_read_written_and_sealed(older: Store, draft: Any) -> None:
    assert [one for one in verify_store(older) if one.state != "ok"] == []
    assert len(unsealed_files(older)) == 11  # all but what only seals tell of: rare tokens
    assert Store.open(older.path).manifest("legal").version == 3

    older.commit(draft, FILES)
    assert len(unsealed_files(older)) == 10  # latest was moved

    assert seal_store(older) == 10
    assert unsealed_files(older) == []
    assert seal_store(older) == 0
    assert list(check_small_files(older)) == []


def test_a_damaged_file_is_not_sealed(older: Store) -> None:
    path = older.path / "domains" / "legal" / "1.json"
    path.write_bytes(path.read_bytes().replace(b'"version"', b'"versio"'))

    seal_store(older)

    assert unsealed_files(older) == [path]
    assert [one.reference for one in check_small_files(older)] == ["legal@1"]


# --- one unreadable manifest does not stop what can be said without it ---


def test_the_log_tells_of_every_other_version(store: Store) -> None:
    (store.path / "domains" / "legal" / "1.json").write_bytes(b"{")
    (store.path / "domains" / "tax" / "aliases" / "latest").write_bytes(b"7\n")
    left_out: dict[str, Any] = {}

    found = version_log(store, on_unreadable=left_out.__setitem__)

    assert [(one.name, one.version) for one in found] == [("tax", 1), ("legal", 3), ("legal", 2)]
    assert left_out.keys() == {"legal@1", "aliases of tax"}
    with pytest.raises(IntegrityError):
        version_log(store)
