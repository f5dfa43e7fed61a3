"""Blobs: immutable, read-only files named by the digest of their bytes.

    <store>/blobs/sha256/ab/ab12...

The same bytes are kept once, however many packs name them. Whoever gets a blob gets bytes that were verified.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...domains.errors import IntegrityError
from .files import make_folder, touch, write_atomic

PREFIX: Final = "sha256:"
READ_ONLY: Final = 0o444

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def sha256_of(data: bytes) -> str:
    """Return the digest of the bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """Return the digest of a file's bytes."""
    with open(path, "rb") as file:
        return PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Whether the text is written as a digest: in lower case, in full, with nothing around it."""
    return _DIGEST.fullmatch(text) is not None


def hex_of(digest: str) -> str:
    """Return the 64 hexadecimal digits of a digest.

    Raises:
        IntegrityError: It is not a digest.
    """
    if not is_digest(digest):
        raise IntegrityError(
            f"{digest!r} is not a digest.",
            cause="Expected 'sha256:' and 64 hexadecimal digits in lower case.",
            fix="Restore the file that names it from a backup",
        )
    return digest.removeprefix(PREFIX)


class BlobStore:
    """The blobs of one store folder."""

    def __init__(self, root: Path):
        self.folder = root / "blobs" / "sha256"

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is, or would be."""
        name = hex_of(digest)
        return self.folder / name[:2] / name

    def put(self, data: bytes) -> str:
        """Keep the bytes and return their digest; a damaged blob of that digest is replaced.

        Raises:
            StorageFullError: No space is left.
        """
        digest = sha256_of(data)
        path = self.path(digest)
        make_folder(path.parent)
        if not _keep(path, digest=digest, size=len(data)):
            write_atomic(path, data, mode=READ_ONLY)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the bytes; the digest is checked on the very bytes that are returned.

        Raises:
            IntegrityError: The blob is missing or its bytes are others.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise _damaged(path, digest, found="no file") from error
        found = sha256_of(data)
        if found != digest:
            raise _damaged(path, digest, found=f"{found} in {len(data)} bytes")
        return data

    def holds(self, digest: str, *, size: int) -> bool:
        """Whether the blob is there and whole; gc leaves it for the coming commit."""
        return _keep(self.path(digest), digest=digest, size=size)

    def check(self, digest: str) -> None:
        """Verify a blob as `get` does, without holding it in memory.

        Raises:
            IntegrityError: The blob is missing or its bytes are others.
        """
        path = self.path(digest)
        try:
            found = sha256_of_file(path)
        except FileNotFoundError as error:
            raise _damaged(path, digest, found="no file") from error
        if found != digest:
            raise _damaged(path, digest, found=f"{found} in {self.size(digest)} bytes")

    def renew(self, digest: str) -> bool:
        """Whether the blob is there; its time is renewed, so that gc leaves it for what comes next."""
        try:
            touch(self.path(digest))
        except FileNotFoundError:
            return False
        except PermissionError:  # a colleague's
            return digest in self
        return True

    def size(self, digest: str) -> int:
        """Return the number of bytes on disk.

        Raises:
            IntegrityError: The blob is missing.
        """
        path = self.path(digest)
        try:
            return path.stat().st_size
        except FileNotFoundError as error:
            raise _damaged(path, digest, found="no file") from error

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def all(self) -> Iterator[str]:
        """Yield the digest of every blob, in order; other files are passed over."""
        if not self.folder.is_dir():
            return
        for folder in sorted(os.listdir(self.folder)):
            if re.fullmatch("[0-9a-f]{2}", folder):
                for name in sorted(os.listdir(self.folder / folder)):
                    if name.startswith(folder) and is_digest(PREFIX + name):
                        yield PREFIX + name


def _keep(path: Path, *, digest: str, size: int) -> bool:
    """Whether the blob is there and whole; its time is renewed first, so that gc leaves it for the coming commit."""
    try:
        touch(path)
        return path.stat().st_size == size and sha256_of_file(path) == digest
    except (FileNotFoundError, PermissionError):  # a colleague's blob cannot be touched; a copy of ours can replace it
        return False


def _damaged(path: Path, expected: str, *, found: str) -> IntegrityError:
    return IntegrityError(
        f"The stored file {path} is damaged.",
        cause=f"Expected {expected}, found {found}.",
        fix="Restore the file from a backup, or add the domain again to a new registry.",
    )
