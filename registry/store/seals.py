"""Seals: the digests of a store's small files, kept in the names of empty files, so that no byte goes uncovered.

    <folder>/seals/<name>-<64 hexadecimal digits>      of <folder>/<name>, "/" written as "+"

A seal is made before its file is written, and seals of older bytes are deleted afterwards: a process that is killed at
any point leaves a file with a seal. The sealed files keep their bytes, so programs that know no seals read them. A file
without any seal was written by such a program; it is sealed when it is written next, or by `registry verify --seal`.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ...domains.errors import IntegrityError
from .blobs import hex_of, sha256_of
from .files import delete, make_empty, make_folder, write_atomic

FOLDER: Final = "seals"
ATTEMPTS: Final = 20  # reads of a file that another process keeps replacing

_SEAL = re.compile(r"(.+)-([0-9a-f]{64})")


class Seals:
    """The seals of the files of one folder; names are relative to it, with forward slashes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / FOLDER

    def add(self, name: str, data: bytes) -> None:
        """Seal the bytes that a file is about to have; seals of other bytes stay.

        Raises:
            StorageFullError: No space is left.
        """
        make_folder(self.path)
        make_empty(self._seal(name, sha256_of(data)))

    def keep_only(self, name: str, data: bytes) -> None:
        """Delete the seals of other bytes, once the file has these."""
        for digest in self.of(name) - {sha256_of(data)}:
            delete(self._seal(name, digest))

    def drop(self, name: str) -> None:
        """Delete the seals of a file, once the file is deleted."""
        for digest in self.of(name):
            delete(self._seal(name, digest))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically, with its seal."""
        self.add(name, data)
        write_atomic(self.folder / name, data)
        self.keep_only(name, data)

    def of(self, name: str) -> set[str]:
        """Return the digests that a file may have; empty if it is not sealed."""
        return self.all().get(name, set())

    def all(self) -> dict[str, set[str]]:
        """Return the digests that each sealed file may have, by its name."""
        found: dict[str, set[str]] = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for match in map(_SEAL.fullmatch, sorted(os.listdir(self.path))):
                if match:
                    found.setdefault(match[1].replace("+", "/"), set()).add(f"sha256:{match[2]}")
        return found

    def accept(self, name: str, data: bytes) -> bool:
        """Return whether a file may have these bytes: they are sealed, or the file is not."""
        return self._seal(name, sha256_of(data)).exists() or not self.of(name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: There is no such file.
            IntegrityError: They differ from what was sealed.
        """
        path = self.folder / name
        data, before = path.read_bytes(), None
        for _ in range(ATTEMPTS):
            if self.accept(name, data):
                return data
            state = data, frozenset(self.of(name))
            if state == before:  # otherwise another process is writing it
                break
            data, before = path.read_bytes(), state
        raise damaged(path, found=sha256_of(data), expected=self.of(name))

    def seal(self, name: str, *, check: Callable[[bytes], object]) -> bool:
        """Seal a file that has no seal, if its bytes pass the check; return whether it was sealed.

        Raises:
            LoraryError: The bytes do not pass it.
        """
        data = (self.folder / name).read_bytes()
        if self.of(name):
            return False
        check(data)
        self.add(name, data)
        return True

    def _seal(self, name: str, digest: str) -> Path:
        return self.path / f"{name.replace('/', '+')}-{hex_of(digest)}"


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file atomically, with a seal beside it."""
    Seals(path.parent).write(path.name, data)


def damaged(path: Path, *, found: str, expected: set[str]) -> IntegrityError:
    """Return the error for a file whose bytes differ from its seal."""
    return IntegrityError(
        f"The file {path} is damaged.",
        cause=f"Expected {' or '.join(sorted(expected))}, found {found}.",
        fix=f"Restore the file from a backup; if you changed it yourself: rm '{path.parent / FOLDER}/{path.name}-'*",
    )
