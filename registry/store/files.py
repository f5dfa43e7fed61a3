"""Atomic, durable file operations: a file is written completely or not at all, even across a power cut.

All writes to the store go through this module. Bytes are written to a temporary file in the same folder, flushed with
fsync, and then renamed (replaces an existing file) or hard-linked (fails if the file exists). The folder is flushed
before a function returns, so the write is durable. A crash leaves at most a `.tmp-...` file, which readers ignore.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ...domains.errors import ConflictError, LoraryError, StorageFullError

TEMPORARY_PREFIX: Final = ".tmp-"

LOCK_TIMEOUT_S: Final = 60.0  # locks are held for the time of a few file operations
LOCK_PAUSE_S: Final = 0.01

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_FAILED: Final = {errno.EIO, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE}
_NO_HARD_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically, replacing an existing one; readers see either the old bytes or the new ones.

    Raises:
        StorageFullError: No space is left; nothing has changed.
    """
    with _explained(path), _temporary_file(path.parent, data, mode) as temporary:
        os.replace(temporary, path)
        fsync_folder(path.parent)


def write_once(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically unless it exists; of several concurrent writers exactly one succeeds.

    Raises:
        FileExistsError: The file exists; it is left unchanged.
        StorageFullError: No space is left.
    """
    with _explained(path), _temporary_file(path.parent, data, mode) as temporary:
        _link(temporary, path)
        fsync_folder(path.parent)


def make_empty(path: Path) -> None:
    """Create an empty file durably; an existing file is left unchanged.

    Raises:
        StorageFullError: No space is left.
    """
    with _explained(path):
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444))
        fsync_folder(path.parent)


def delete(path: Path) -> None:
    """Delete a file durably; a missing file is not an error."""
    with _explained(path), suppress(FileNotFoundError):
        os.unlink(path)
        fsync_folder(path.parent)


def delete_tree(path: Path) -> None:
    """Delete a folder and everything in it; a missing folder is not an error."""
    with _explained(path), suppress(FileNotFoundError):
        shutil.rmtree(path)


def move(path: Path, target: Path) -> None:
    """Rename a file on the same disk, replacing an existing one.

    After a power cut it may have either name.
    """
    with _explained(target):
        os.replace(path, target)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and flush its directory entry even if it existed."""
    with _explained(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)  # a file in its place is an error
        fsync_folder(path.parent)


def touch(path: Path) -> None:
    """Set a file's mtime to now, which restarts the grace period before unreachable blobs are deleted.

    Raises:
        FileNotFoundError, PermissionError: The file is missing or owned by another user; the caller handles both.
    """
    with _explained(path, but=PermissionError):
        os.utime(path)


def fsync_folder(path: Path) -> None:
    """Flush a folder's directory entries to disk, so that a rename or link in it survives a power cut."""
    if os.name == "nt":  # folders cannot be opened; NTFS journals directory entries itself
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems flush directory entries themselves and refuse this
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder; on success flush it and rename it to `path`.

    On an error the temporary file or folder is deleted.

    Raises:
        ConflictError: `path` exists, or is created by another process meanwhile.
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
def folder_lock(path: Path, *, is_shared: bool = False, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold a lock on a folder, exclusive or shared; do nothing where the file system has no locks.

    The operating system releases it when the process ends, however it ends.

    Raises:
        ConflictError: Another process holds it for longer than `timeout_s`.
    """
    with _opened(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)) as descriptor:
        end = time.monotonic() + timeout_s
        while not _lock(descriptor, is_shared=is_shared):
            if time.monotonic() > end:
                raise _held(path, timeout_s)
            time.sleep(LOCK_PAUSE_S)
        yield


@contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file if it is free, and yield whether it was; true where there are no locks."""
    with _opened(path, os.O_RDONLY) as descriptor:
        yield _lock(descriptor, is_shared=False)


def process_start(process: int) -> str:
    """Return when a process began, as the operating system counts; empty if it does not run or that is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int | None]:
    """Yield a descriptor of a file or folder; None where folders cannot be opened (Windows)."""
    if os.name == "nt":
        yield None
        return
    with _explained(path):
        descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int | None, *, is_shared: bool) -> bool:
    """Return whether the lock was free, or cannot exist: NFS and others refuse locks on folders, Windows has none."""
    try:
        import fcntl
    except ImportError:
        return True
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EINTR)
    return True


def _held(path: Path, timeout_s: float) -> ConflictError:
    holders = _holders(path)
    named = "; ".join(f"process {process}: {command}" for process, command in holders.items())
    return ConflictError(
        f"{path} is locked by another process.",
        cause=f"{named or 'a process that is not known'}, for more than {timeout_s:g} s",
        fix=f"End it if it hangs, then repeat the command: kill {' '.join(map(str, holders))}"
        if holders
        else f"Find it, and end it if it hangs: fuser {path}",
    )


def _holders(path: Path) -> dict[int, str]:
    """Return process ids and commands of those who hold a lock on a folder, as far as Linux says."""
    try:
        inode, lines = path.stat().st_ino, Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    owners = {int(one[4]) for one in fields if len(one) > 5 and one[5].rpartition(":")[2] == str(inode)}
    found = {}
    for process in sorted(owners - {0}):
        with suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            found[process] = b" ".join(words).decode("utf-8", "replace").strip()[:200]
    return found


@contextmanager
def _temporary_file(folder: Path, data: bytes, mode: int) -> Iterator[Path]:
    """Yield a flushed temporary file with these bytes; it is always deleted afterwards."""
    temporary = folder / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            yield temporary
        except FileNotFoundError as error:
            raise LoraryError(
                f"Cannot write a file in {folder}.",
                cause="its temporary file was deleted, as by a gc without a grace period",
                fix="Repeat the command.",
            ) from error
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
        # NFS may lose the reply to a successful link, retry it, and get "file exists"
        if os.stat(temporary).st_nlink < 2:
            raise
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise LoraryError(
                f"Cannot write {path}.",
                cause="This file system does not support hard links, which concurrent writers need.",
                fix="Keep the store on another disk: registry init --store PATH",
            ) from error
        raise


@contextmanager
def _explained(path: Path, *, but: type[OSError] = FileExistsError) -> Iterator[None]:
    """Turn errors of a full, protected or failing disk into a `LoraryError` with a fix; `but` passes through."""
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
            _FORBIDDEN, f"Check the write permission, or choose another store: ls -ld {path.parent}"
        ) | dict.fromkeys(_FAILED, "Repeat the command; if it fails again, check the disk: registry doctor")
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
        f"{path} is there already.", cause="existing files are not overwritten", fix="choose another path: --out PATH"
    )
