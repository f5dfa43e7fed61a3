import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.errors import IntegrityError
from lorary.registry.store.digest import check_digest, hex_of, is_digest, sha256_of, sha256_of_file


def test_digest_of_known_bytes():
    assert sha256_of(b"abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 63])
def test_file_has_the_digest_of_its_bytes(tmp_path, size):
    data = b"x" * size
    (tmp_path / "file").write_bytes(data)

    assert sha256_of_file(tmp_path / "file") == sha256_of(data)


@given(st.binary())
def test_every_digest_is_valid(data):
    assert check_digest(sha256_of(data)) == sha256_of(data)
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
        check_digest(text)
