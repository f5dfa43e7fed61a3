"""Files are hashed once, and again as soon as anything about them has changed."""

import json
import os
import time

import pytest

from lorary.domains.errors import IntegrityError
from lorary.registry.store.hashed_files import CACHE_FILE, check_files
from lorary.registry.store.store import Store

FILES = {"a": (b"first", "expert"), "b": (b"second", "expert")}


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store", {})


@pytest.fixture
def settled(store, draft):
    """A store with one version that was hashed long after its files were written."""
    manifest = store.commit(draft, FILES)
    check_files(store, [manifest])
    _set_time(store, ahead_s=60)
    return store


def _set_time(store, *, ahead_s):
    """As if the cache had been written so much later."""
    later = time.time() + ahead_s
    os.utime(store.cache / CACHE_FILE, (later, later))


def _path(store, name):
    return store.blobs.path(store.manifest("legal").file(name).sha256)


def test_files_just_written_are_hashed_again(store, draft):
    manifest = store.commit(draft, FILES)

    assert check_files(store, [manifest]) == 2
    assert check_files(store, [manifest]) == 2


def test_files_hashed_when_they_had_settled_are_not_hashed_again(settled):
    assert check_files(settled, settled.history("legal")) == 0


def test_a_version_that_is_new_is_hashed_and_the_older_ones_are_not(settled, draft):
    settled.commit(draft, {"c": (b"third", "expert")})

    assert check_files(settled, settled.history("legal")) == 1


@pytest.mark.parametrize("keeps_times", [True, False])
@pytest.mark.parametrize("data", [b"fersT", b"longer than before"])
def test_a_changed_file_is_found_whatever_its_size_and_time(settled, data, keeps_times):
    path = _path(settled, "a")
    status = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    if keeps_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(IntegrityError, match="1 of 2 files"):
        check_files(settled, settled.history("legal"))


def test_a_file_that_was_replaced_by_another_is_found(settled, tmp_path):
    path = _path(settled, "a")
    (tmp_path / "other").write_bytes(b"fersT")
    os.utime(tmp_path / "other", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(tmp_path / "other", path)

    with pytest.raises(IntegrityError):
        check_files(settled, settled.history("legal"))


def test_a_missing_file_is_found(settled):
    _path(settled, "b").unlink()

    with pytest.raises(IntegrityError):
        check_files(settled, settled.history("legal"))


def test_files_of_a_removed_version_are_not_asked_for(settled, draft):
    settled.commit(draft, {"c": (b"third", "expert")})
    _path(settled, "c").unlink()

    settled.remove("legal@2")

    assert check_files(settled, settled.history("legal")) == 0


def test_a_version_that_is_removed_while_it_is_checked_is_passed_over(settled, draft, monkeypatch):
    manifest = settled.commit(draft, {"c": (b"third", "expert")})
    verify = settled.verify

    def removed_meanwhile(manifest):
        settled.remove("legal@2")
        settled.blobs.path(manifest.files[0].sha256).unlink()
        verify(manifest)

    monkeypatch.setattr(settled, "verify", removed_meanwhile)

    assert check_files(settled, [manifest]) == 0


def test_a_failed_check_is_not_remembered(settled):
    path = _path(settled, "a")
    path.chmod(0o644)
    path.write_bytes(b"fersT")

    for _ in range(2):
        with pytest.raises(IntegrityError):
            check_files(settled, settled.history("legal"))
        _set_time(settled, ahead_s=60)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"a": 1}', b'{"sha256:x": "1 2 3 x"}', b"\xff"])
def test_a_damaged_cache_is_no_cache(settled, data):
    (settled.cache / CACHE_FILE).write_bytes(data)
    _set_time(settled, ahead_s=60)

    assert check_files(settled, settled.history("legal")) == 2
    assert len(json.loads((settled.cache / CACHE_FILE).read_bytes())) == 2
