"""Sources of a pack's files: a folder, or bytes in memory. A `Store` is a source too.

Every file is verified against the manifest before it is parsed. In a folder only regular files are read, up to the size
in the manifest, and no link is followed, so nothing outside the folder can be read.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from ...domains.errors import IntegrityError
from ..store.blobs import sha256_of
from ..store.manifest import MANIFEST_FILE, PackFile, PackManifest
from ..store.strict_json import MAX_BYTES

_NO_LINKS: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CHUNK: Final = 1 << 20  # bytes


class PackSource(Protocol):
    """Source of the verified bytes of a pack's files."""

    def read(self, manifest: PackManifest, path: str) -> bytes:
        """Return the bytes of one file, verified against the manifest's digest."""
        ...


class PackBytes:
    """Pack in memory: path to bytes."""

    def __init__(self, files: Mapping[str, bytes]):
        self.files = files

    def read(self, manifest: PackManifest, path: str) -> bytes:
        """Return the verified bytes of one file.

        Raises:
            IntegrityError: The file is missing, or differs from the manifest.
        """
        wanted = manifest.file(path)
        if path not in self.files:
            raise IntegrityError(f"{path} is missing.", cause=f"{manifest.name}@{manifest.version} names it")
        return _verified(self.files[path], wanted, where=path)


class PackFolder:
    """Pack in a plain folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, manifest: PackManifest, path: str) -> bytes:
        """Return the verified bytes of one file.

        Raises:
            IntegrityError: The file is missing, not a regular file, behind a link, or differs from the manifest.
        """
        wanted = manifest.file(path)
        data = read_plain(self.folder, path, limit=wanted.size)
        return _verified(data, wanted, where=str(self.folder / path))

    def manifest(self) -> PackManifest:
        """Read the manifest in the folder; it is untrusted.

        Raises:
            IntegrityError: The manifest is missing or invalid.
            IncompatibleError: A newer program wrote it.
        """
        data = read_plain(self.folder, MANIFEST_FILE, limit=MAX_BYTES)
        return PackManifest.from_json(data, source=str(self.folder / MANIFEST_FILE))

    def check_nothing_else(self, manifest: PackManifest) -> None:
        """Raise IntegrityError if the folder holds anything that its manifest does not list.

        Raises:
            IntegrityError: There is such a file, folder or link; the message names the first one.
        """
        known = {MANIFEST_FILE, *(file.path for file in manifest.files)}
        folders = {str(parent) for path in known for parent in PurePosixPath(path).parents}
        for path, is_folder in _entries(self.folder):
            if path not in (folders if is_folder else known):
                raise IntegrityError(
                    f"{self.folder} holds more than its manifest names.",
                    cause=f"{path[:255]!r} is not one of the {len(known)} files of {manifest.name}@{manifest.version}",
                    fix="move what does not belong to the pack out of the folder",
                )


def read_plain(folder: Path, path: str, *, limit: int) -> bytes:
    """Read at most `limit + 1` bytes of a regular file; no link is followed below `folder`.

    Raises:
        IntegrityError: The file is missing, not a regular file, or behind a link.
    """
    try:
        descriptor = _open(folder, path)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise IntegrityError(f"{folder / path} is no regular file.", cause="a device, a pipe or a folder")
            return _read(descriptor, limit + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        cause = "It is a link." if _is_behind_link(folder, path) else os.strerror(error.errno or 0)
        raise IntegrityError(
            f"{folder / path} is missing, or cannot be read.", cause=cause, fix="download the pack again"
        ) from error


def _open(folder: Path, path: str) -> int:
    """Open a file one folder at a time, so that no folder on the path can be swapped for a link."""
    if os.open not in os.supports_dir_fd:  # Windows
        if _is_behind_link(folder, path):
            raise OSError("a link")
        return os.open(folder / path, os.O_RDONLY | _NO_LINKS)
    *parents, name = path.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for parent in parents:
            there = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS, dir_fd=here)
            os.close(here)
            here = there
        return os.open(name, os.O_RDONLY | _NO_LINKS, dir_fd=here)
    finally:
        os.close(here)


def _read(descriptor: int, limit: int) -> bytes:
    pieces: list[bytes] = []
    while limit and (piece := os.read(descriptor, min(_CHUNK, limit))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _is_behind_link(folder: Path, path: str) -> bool:
    parts = path.split("/")
    return any((folder / "/".join(parts[: i + 1])).is_symlink() for i in range(len(parts)))


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the relative path of everything below a folder, and whether it is a folder; links are not."""
    waiting = [""]
    while waiting:
        here = waiting.pop()
        with os.scandir(folder / here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = here + entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                yield path, is_folder
                if is_folder:
                    waiting.append(f"{path}/")


def _verified(data: bytes, wanted: PackFile, *, where: str) -> bytes:
    found = sha256_of(data)
    if len(data) != wanted.size or found != wanted.sha256:
        size = f"more than {wanted.size}" if len(data) > wanted.size else str(len(data))
        raise IntegrityError(
            f"{where} differs from its manifest.",
            cause=f"expected {wanted.sha256} in {wanted.size} bytes, found {found} in {size}",
            fix="download the pack again",
        )
    return data
