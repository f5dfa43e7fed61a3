import hashlib
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorary.domains.errors import IntegrityError
from lorary.registry.store.blobs import BlobStore, hex_of, is_digest, sha256_of, sha256_of_file


def test_digest_of_known_bytes():
    assert sha256_of(b"abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 63])
def test_file_has_the_digest_of_its_bytes(tmp_path, size):
    data = b"x" * size
    (tmp_path / "file").write_bytes(data)

    assert sha256_of_file(tmp_path / "file") == sha256_of(data)


@given(st.binary())
def test_every_digest_is_valid(data):
    assert is_digest(sha256_of(data))
    assert hex_of(sha256_of(data)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "ab" * 32,
        "sha256:" + "AB" * 32,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 64 + "\n",
        "md5:" + "a" * 64,
    ]
    + ["sha256:" + "/../" * 16],
)
def test_other_text_is_refused(text):
    assert not is_digest(text)
    with pytest.raises(IntegrityError, match="not a digest"):
        hex_of(text)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path)


def damage(blobs, digest, data):
    """Overwrite a blob in place, as a failing disk would."""
    path = blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(data=st.binary())
def test_what_is_put_comes_back(blobs, data):
    digest = blobs.put(data)

    assert blobs.get(digest) == data
    assert blobs.size(digest) == len(data)
    assert digest in blobs


def test_blob_lies_under_its_digest_and_is_read_only(blobs, tmp_path):
    digest = blobs.put(b"abc")

    name = digest.removeprefix("sha256:")
    path = tmp_path / "blobs" / "sha256" / name[:2] / name
    assert path.read_bytes() == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_same_bytes_are_kept_once_and_not_written_again(blobs):
    digest = blobs.put(b"abc")
    before = blobs.path(digest).stat()

    assert blobs.put(b"abc") == digest

    assert blobs.path(digest).stat().st_ino == before.st_ino
    assert list(blobs.all()) == [digest]


def test_putting_again_restarts_the_grace_period(blobs):
    digest = blobs.put(b"abc")
    os.utime(blobs.path(digest), (1, 1))

    blobs.put(b"abc")

    assert blobs.path(digest).stat().st_mtime > 1


@pytest.mark.parametrize("damaged", [b"", b"ab", b"abd", b"abcd"])
def test_damaged_blob_is_found_and_named(blobs, damaged):
    digest = blobs.put(b"abc")
    damage(blobs, digest, damaged)

    for read in (blobs.get, blobs.check):
        with pytest.raises(IntegrityError) as caught:
            read(digest)
        assert str(blobs.path(digest)) in caught.value.message
        assert digest in str(caught.value.cause)
        assert sha256_of(damaged) in str(caught.value.cause)
        assert caught.value.fix


@pytest.mark.parametrize("damaged", [b"", b"ab", b"abd", b"abcd"])
def test_putting_again_repairs_a_damaged_blob(blobs, damaged):
    digest = blobs.put(b"abc")
    damage(blobs, digest, damaged)

    blobs.put(b"abc")

    assert blobs.get(digest) == b"abc"


def test_blob_of_a_colleague_is_replaced_by_a_copy(blobs, monkeypatch):
    digest = blobs.put(b"abc")

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)

    assert blobs.put(b"abc") == digest
    assert blobs.get(digest) == b"abc"


def test_missing_blob_is_an_integrity_error(blobs):
    digest = sha256_of(b"never put")

    assert digest not in blobs
    for read in (blobs.get, blobs.check, blobs.size):
        with pytest.raises(IntegrityError, match="no file"):
            read(digest)


@pytest.mark.parametrize("digest", ["", "sha256:../../../etc/passwd", "abc"])
def test_text_that_is_no_digest_never_becomes_a_path(blobs, digest):
    with pytest.raises(IntegrityError, match="not a digest"):
        blobs.get(digest)


def test_all_passes_over_other_files_and_folders(blobs, tmp_path):
    digests = {blobs.put(bytes([i])) for i in range(20)}
    (tmp_path / "blobs" / "sha256" / "README").write_bytes(b"")
    (blobs.path(next(iter(digests))).parent / ".tmp-0123").write_bytes(b"")

    assert list(blobs.all()) == sorted(digests)


def test_all_of_a_store_without_blobs_is_empty(blobs):
    assert list(blobs.all()) == []
