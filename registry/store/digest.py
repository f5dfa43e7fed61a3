"""Digests: `sha256:` and the 64 hexadecimal digits of the SHA-256 of some bytes."""

import hashlib
import re
from pathlib import Path
from typing import Final

from ...domains.errors import IntegrityError

PREFIX: Final = "sha256:"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK: Final = 1 << 20  # bytes


def sha256_of(data: bytes) -> str:
    """Return the digest of the bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """Return the digest of a file's bytes, read piece by piece."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    return PREFIX + sha256.hexdigest()


def is_digest(text: str) -> bool:
    """Whether the text is written as a digest: in lower case, in full, with nothing around it."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str) -> str:
    """Return the digest as it came.

    Raises:
        IntegrityError: It is not written as a digest.
    """
    if not is_digest(text):
        raise IntegrityError(
            f"{text!r} is not a digest.",
            cause="Expected 'sha256:' and 64 hexadecimal digits in lower case.",
            fix="Restore the file that names it from a backup",
        )
    return text


def hex_of(digest: str) -> str:
    """Return the 64 hexadecimal digits of a valid digest."""
    return check_digest(digest).removeprefix(PREFIX)
