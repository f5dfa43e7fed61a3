"""Blobs: immutable, read-only files named by the digest of their bytes.

    <store>/blobs/sha256/ab/ab12...

Identical bytes are stored once, however many packs reference them. Every read is verified against the digest.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from ...domains.errors import IntegrityError
from .files import folder_lock, make_folder, touch, write_atomic

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
    """Return whether the text is exactly a digest: `sha256:` and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def hex_of(digest: str) -> str:
    """Return the 64 hexadecimal digits of a digest.

    Raises:
        IntegrityError: The text is not a digest.
    """
    if not is_digest(digest):
        raise IntegrityError(
            f"{digest!r} is not a digest.",
            cause="Expected 'sha256:' and 64 hexadecimal digits in lower case.",
            fix="Restore the file that contains it from a backup",
        )
    return digest.removeprefix(PREFIX)


class BlobStore:
    """The blobs of one store folder."""

    def __init__(self, root: Path):
        self.folder = root / "blobs" / "sha256"

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold off the deletion of blobs while new or renewed ones are not yet named by a version.

        Raises:
            ConflictError: A garbage collection hangs.
        """
        # a collection holds the first lock while it waits for the second, so that new leases wait for it
        if not self.folder.is_dir():
            make_folder(self.folder)
        with ExitStack() as held:
            with folder_lock(self.folder, is_shared=True):
                held.enter_context(folder_lock(self.folder.parent, is_shared=True))
            yield

    @contextmanager
    def no_leases(self) -> Iterator[None]:
        """Wait for all leases to end, and keep new ones waiting: blobs that no version names are named by none to come.

        Raises:
            ConflictError: A writer hangs.
        """
        if not self.folder.is_dir():
            make_folder(self.folder)
        with folder_lock(self.folder), folder_lock(self.folder.parent):
            yield

    def path(self, digest: str) -> Path:
        """Return the path of the blob with this digest; it need not exist."""
        name = hex_of(digest)
        return self.folder / name[:2] / name

    def put(self, data: bytes) -> str:
        """Store the bytes and return their digest; a damaged blob with that digest is replaced.

        Raises:
            StorageFullError: No space is left.
        """
        digest = sha256_of(data)
        path = self.path(digest)
        make_folder(path.parent)
        if not _keep(path, digest=digest, size=len(data)):
            write_atomic(path, data, mode=READ_ONLY)
        return digest

    def put_if_missing(self, data: bytes) -> None:
        """Store the bytes again if their blob is gone; its bytes are not read."""
        if sha256_of(data) not in self:
            self.put(data)

    def get(self, digest: str) -> bytes:
        """Return the bytes of a blob after checking their digest.

        Raises:
            IntegrityError: The blob is missing or damaged.
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
        """Return whether the blob exists and is intact; renew its mtime so that gc keeps it for the next commit."""
        return _keep(self.path(digest), digest=digest, size=size)

    def check(self, digest: str) -> None:
        """Verify a blob as `get` does, without loading it into memory.

        Raises:
            IntegrityError: The blob is missing or damaged.
        """
        path = self.path(digest)
        try:
            found = sha256_of_file(path)
        except FileNotFoundError as error:
            raise _damaged(path, digest, found="no file") from error
        if found != digest:
            raise _damaged(path, digest, found=f"{found} in {self.size(digest)} bytes")

    def renew(self, digest: str) -> bool:
        """Renew the mtime of a blob so that gc keeps it; return whether the blob exists."""
        try:
            touch(self.path(digest))
        except FileNotFoundError:
            return False
        except PermissionError:  # owned by another user
            return digest in self
        return True

    def size(self, digest: str) -> int:
        """Return the size of a blob on disk, in bytes.

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
        """Yield the digest of every blob, sorted; other files are skipped."""
        if not self.folder.is_dir():
            return
        for folder in sorted(os.listdir(self.folder)):
            if re.fullmatch("[0-9a-f]{2}", folder):
                for name in sorted(os.listdir(self.folder / folder)):
                    if name.startswith(folder) and is_digest(PREFIX + name):
                        yield PREFIX + name


def _keep(path: Path, *, digest: str, size: int) -> bool:
    """Return whether the blob exists and is intact; renew its mtime first so that gc keeps it for the next commit."""
    try:
        touch(path)
        return path.stat().st_size == size and sha256_of_file(path) == digest
    except (FileNotFoundError, PermissionError):  # another user's blob cannot be touched, only replaced
        return False


def _damaged(path: Path, expected: str, *, found: str) -> IntegrityError:
    return IntegrityError(
        f"The stored file {path} is damaged.",
        cause=f"Expected {expected}, found {found}.",
        fix="Restore the file from a backup, or add the domain again to a new registry.",
    )
