"""The only module that writes to disk: a file is there completely or not at all, also after a power cut.

Bytes go to a temporary name in the same folder, are flushed to the device, and then get their final name in one step:
by rename (replaces what was there) or by link (fails if something is there). The folder is flushed before a function
returns, so what it wrote survives. A crash leaves at most a file named `.tmp-...`, which readers ignore.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ...domains.errors import ConflictError, LoraryError, StorageFullError

TEMPORARY_PREFIX: Final = ".tmp-"

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_FAILED: Final = {errno.EIO, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE}
_NO_HARD_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file, replacing the one that may be there; readers see the old bytes or the new ones.

    Raises:
        StorageFullError: No space is left; nothing has changed.
    """
    with _explained(path), _temporary_file(path.parent, data, mode) as temporary:
        os.replace(temporary, path)
        fsync_folder(path.parent)


def write_once(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file unless it is there already; of many writers exactly one succeeds.

    Raises:
        FileExistsError: It is there; it stays as it is.
        StorageFullError: No space is left.
    """
    with _explained(path), _temporary_file(path.parent, data, mode) as temporary:
        _link(temporary, path)
        fsync_folder(path.parent)


def delete(path: Path) -> None:
    """Delete a file, so that it stays deleted after a power cut; nothing is said of a file that is not there."""
    with _explained(path), suppress(FileNotFoundError):
        os.unlink(path)
        fsync_folder(path.parent)


def delete_tree(path: Path) -> None:
    """Delete a folder with everything in it; what is gone already is no error."""
    with _explained(path), suppress(FileNotFoundError):
        shutil.rmtree(path)


def move(path: Path, target: Path) -> None:
    """Give a file another name on the same disk, replacing the one that may be there.

    After a power cut it may have either name.
    """
    with _explained(target):
        os.replace(path, target)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush its name, whoever made it."""
    with _explained(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)  # a file in its place is an error
        fsync_folder(path.parent)


def touch(path: Path) -> None:
    """Set a file's time to now, which restarts the grace period before unreachable blobs are deleted.

    Raises:
        FileNotFoundError, PermissionError: It is not there, or somebody else's; the caller knows what that means.
    """
    with _explained(path, but=PermissionError):
        os.utime(path)


def fsync_folder(path: Path) -> None:
    """Flush a folder's names to the device, so that a rename or link in it survives a power cut."""
    if os.name == "nt":  # cannot open folders; NTFS journals names itself
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems flush names by themselves and refuse this
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary name for a new file or folder, which gets its own name when all is written and flushed, or never.

    Raises:
        ConflictError: There is something at the path, before or meanwhile.
        StorageFullError: No space is left; nothing has changed.
    """
    if os.path.lexists(path):
        raise _taken(path)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"
    with _explained(path):
        make_folder(path.parent)
        try:
            yield temporary
            _fsync_tree(temporary)
            _rename_new(temporary, path)
            fsync_folder(path.parent)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Keep other writers of one folder waiting, where the file system has locks; elsewhere do nothing."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with _explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS and others refuse locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_file(folder: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A flushed file under a name of its own; that name is gone afterwards, whatever happens."""
    temporary = folder / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may lose the answer to a link that worked, ask again, and be told that the name exists
        if os.stat(temporary).st_nlink < 2:
            raise
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise LoraryError(
                f"Cannot write {path}.",
                cause="This file system has no hard links, which make two writers safe from each other.",
                fix="Keep the store on another disk: registry init --store PATH",
            ) from error
        raise


@contextmanager
def _explained(path: Path, *, but: type[OSError] = FileExistsError) -> Iterator[None]:
    """Turn what a person can repair, a full, protected or failing disk, into an error that says so, all but `but`."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"No space is left to write {path}.",
                cause=os.strerror(error.errno),
                fix="Free some space on that disk, for example: registry gc",
            ) from error
        fixes = dict.fromkeys(
            _FORBIDDEN, f"Get the right to write there, or choose another store: ls -ld {path.parent}"
        ) | dict.fromkeys(_FAILED, "Repeat the command; if it fails again, look at the disk: registry doctor")
        if error.errno in fixes:
            raise LoraryError(
                f"Cannot write {path}.", cause=os.strerror(error.errno), fix=fixes[error.errno]
            ) from error
        raise


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        if temporary.is_dir():
            os.rename(temporary, path)  # fails over a file, and over a folder that is not empty
        else:
            _link(temporary, path)
    except (FileExistsError, NotADirectoryError) as error:
        raise _taken(path) from error
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise _taken(path) from error
        raise


def _fsync_tree(path: Path) -> None:
    """Flush a file, or a folder and everything in it."""
    for folder, _, names in os.walk(path):
        for name in names:
            _fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))
    if path.is_file():
        _fsync_file(path)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _taken(path: Path) -> ConflictError:
    return ConflictError(
        f"{path} is there already.", cause="nothing is ever written over it", fix="name another place: --out PATH"
    )
