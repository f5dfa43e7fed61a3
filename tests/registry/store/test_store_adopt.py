"""Versions that were made elsewhere: adopted whole, once, and under their own number where it is free."""

import threading
from dataclasses import replace

import pytest

from lorary.domains.errors import IntegrityError


@pytest.fixture
def theirs(light_store, light_pack):
    """Another registry with three versions of one domain."""
    registry = light_store("theirs")
    for text in ("one", "two", "three"):
        light_pack(registry, text=text)
    return registry.store


@pytest.fixture
def ours(light_store, theirs):
    """A store with their blobs, and none of their versions."""
    store = light_store("ours").store
    for digest in theirs.blobs.all():
        store.blobs.put(theirs.blobs.get(digest))
    return store


def test_a_version_keeps_its_number_and_its_bytes(ours, theirs):
    adopted = ours.adopt(theirs.manifest("legal", 3), alias="latest")

    assert ours.versions("legal") == [3]
    assert adopted.to_json() == theirs.manifest("legal", 3).to_json()
    assert ours.aliases("legal") == {"latest": 3}


def test_an_earlier_version_fills_its_place_and_latest_stays(ours, theirs):
    ours.adopt(theirs.manifest("legal", 3), alias="latest")

    ours.adopt(theirs.manifest("legal", 1), alias="latest")

    assert ours.versions("legal") == [1, 3]
    assert ours.aliases("legal") == {"latest": 3}


def test_a_number_that_is_taken_is_not_taken_twice(ours, theirs):
    ours.adopt(theirs.manifest("legal", 1), alias="latest")

    other = ours.adopt(replace(theirs.manifest("legal", 2), version=1), alias=None)

    assert other.version == 2
    assert ours.manifest("legal", 1).digest == theirs.manifest("legal", 1).digest
    assert ours.aliases("legal") == {"latest": 1}


def test_the_same_pack_is_stored_once_even_by_many_at_once(ours, theirs):
    pack = theirs.manifest("legal", 2)
    threads = [threading.Thread(target=ours.adopt, args=(pack,), kwargs={"alias": "latest"}) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ours.versions("legal") == [2]


def test_latest_does_not_stay_on_a_removed_version(ours, theirs):
    ours.adopt(theirs.manifest("legal", 3), alias="latest")
    ours.remove("legal@3")

    ours.adopt(theirs.manifest("legal", 1), alias="latest")

    assert ours.aliases("legal") == {"latest": 1}


def test_a_removed_version_is_restored_and_latest_moves_to_it(ours, theirs):
    for version in (1, 2):
        ours.adopt(theirs.manifest("legal", version), alias="latest")
    ours.remove("legal@2")
    assert ours.aliases("legal") == {"latest": 1}

    assert ours.adopt(theirs.manifest("legal", 2), alias="latest").version == 2

    assert ours.versions("legal") == [1, 2]
    assert ours.aliases("legal") == {"latest": 2}


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_pack_with_a_damaged_file_is_not_adopted(ours, theirs, damage):
    pack = theirs.manifest("legal", 1)
    path = ours.blobs.path(pack.files[0].sha256)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes({"missing": b"", "short": data[:-1], "changed": bytes([data[0] ^ 1]) + data[1:]}[damage])
    if damage == "missing":
        path.unlink()

    with pytest.raises(IntegrityError, match="not complete") as raised:
        ours.adopt(pack, alias="latest")

    assert pack.files[0].path in str(raised.value.cause)
    assert ours.versions("legal") == []
