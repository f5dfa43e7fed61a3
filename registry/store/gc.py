"""Garbage collection: delete unreferenced blobs, stale temporary files and finished checkpoints.

A blob is needed while a manifest references it, including the manifest of a version removed less than the grace period
ago. A writer stores its blobs first and links its manifest last, so an unreferenced blob may be about to be referenced.
It holds a lease meanwhile (`BlobStore.lease`), a lock that ends with its process; blobs are deleted while there is
none. So the grace period is for people who want a removed version back, and for packs that are being pulled: with a
wrong clock, or without a grace period, a pull has to be repeated, and nothing that a version names is lost.

Where a file system has no locks, order protects: blobs are first moved to quarantine; then all manifests are read
again, and a blob that is referenced by now, or was touched before it was moved, is moved back. A writer looks for its
blobs again after its manifest is linked, and stores what was moved away.

Deleting needs no disk space. Creating the quarantine folder may; on a full disk the ballast is deleted for it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from ...domains.errors import IntegrityError, StorageFullError
from .blobs import PREFIX
from .files import TEMPORARY_PREFIX, delete, delete_tree, folder_lock, make_folder, move
from .store import Store
from .strict_json import parse_json

GRACE_S: Final = 24 * 3600.0
QUARANTINE: Final = "quarantine"  # beside blobs/sha256


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Result of a garbage collection, or of a dry run."""

    blobs: tuple[str, ...]  # digests
    temporary: tuple[Path, ...]  # files left behind by a crash
    checkpoints: tuple[Path, ...]  # folders of runs whose version is stored
    bytes: int  # total size
    young: int  # unreferenced blobs still within the grace period
    is_dry: bool
    unreadable: tuple[str, ...] = ()  # versions whose manifest cannot be read; no blob is deleted beside one


def collect_garbage(store: Store, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
    """Delete unreferenced files that have not been touched for the grace period.

    Where a manifest cannot be read, its blobs are unknown, and no blob is deleted.
    """
    oldest = time.time() - grace_s
    needed, unreadable = needed_blobs(store, since=oldest)
    unnamed = {digest: store.blobs.path(digest) for digest in store.blobs.all() if digest not in needed}
    old = {digest: path for digest, path in unnamed.items() if not unreadable and _is_older(path, oldest)}
    temporary = tuple(path for path in _temporary_files(store) if _is_older(path, oldest))
    checkpoints = tuple(path for path in _finished_checkpoints(store) if _is_older(path, oldest))
    sizes = {digest: _size(path) for digest, path in old.items()}
    others = sum(map(_size, [*temporary, *checkpoints]))
    if not dry_run:
        for path in checkpoints:
            delete_tree(path)
        with store.blobs.no_leases():
            for path in temporary:
                delete(path)
            old = _delete_blobs(store, old, since=oldest)
        store.fill_ballast()
    return Collected(
        blobs=tuple(sorted(old)),
        temporary=temporary,
        checkpoints=checkpoints,
        bytes=others + sum(sizes[digest] for digest in old),
        young=len(unnamed) - len(old),
        is_dry=dry_run,
        unreadable=unreadable,
    )


def needed_blobs(store: Store, *, since: float) -> tuple[set[str], tuple[str, ...]]:
    """Return the digests referenced by versions that are not removed, or were removed after `since`.

    The second value names the versions whose manifest cannot be read.
    """
    needed: set[str] = set()
    unreadable: list[str] = []
    for name in store.domains(removed=True):
        gone = {number for number, removed in store.removed(name).items() if _seconds(removed, unknown=since) < since}
        manifests, problems = store.readable_history(name)
        unreadable += [f"{name}@{number}" for number in problems]
        for manifest in manifests:
            if manifest.version not in gone:
                needed.update(file.sha256 for file in manifest.files)
    return needed, tuple(unreadable)


def _delete_blobs(store: Store, old: dict[str, Path], *, since: float) -> dict[str, Path]:
    """Quarantine blobs, check references again, then delete; also clear what an interrupted gc left in quarantine."""
    aside = _quarantine(store)
    with folder_lock(aside):  # saves concurrent gcs from duplicate work; correctness does not depend on it
        for digest, path in old.items():
            with suppress(FileNotFoundError):  # another gc was faster
                move(path, aside / digest.removeprefix(PREFIX))
        needed, unreadable = needed_blobs(store, since=since)
        for entry in sorted(os.listdir(aside)):
            digest, path = PREFIX + entry, aside / entry
            with suppress(FileNotFoundError):
                if unreadable or digest in needed or not _is_older(path, since):
                    old.pop(digest, None)
                    _put_back(store, digest, path)
                else:
                    delete(path)
    return old


def _put_back(store: Store, digest: str, path: Path) -> None:
    """Move a blob back from quarantine, unless a writer has stored it again."""
    if digest in store.blobs:
        delete(path)
    else:
        move(path, store.blobs.path(digest))


def _quarantine(store: Store) -> Path:
    folder = store.blobs.folder.with_name(QUARANTINE)
    try:
        make_folder(folder)
    except StorageFullError:
        store.drop_ballast()
        make_folder(folder)
    return folder


def _temporary_files(store: Store) -> Iterator[Path]:
    for folder in (store.path, store.blobs.folder, store.path / "domains", store.runs, store.cache):
        pattern = f"{TEMPORARY_PREFIX}*" if folder == store.path else f"**/{TEMPORARY_PREFIX}*"
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def _finished_checkpoints(store: Store) -> Iterator[Path]:
    """Yield checkpoints of runs whose version is stored; run.json stays, it references the domain's text.

    A removed version does not count: repeating its command trains in the same folder.
    """
    finished = {
        manifest.train.get("run")
        for name in store.domains()
        for manifest in store.readable_history(name)[0]
        if manifest.version in store.versions(name)
    }
    for checkpoint in sorted(store.runs.glob("*/checkpoint-*")):
        if checkpoint.parent.name in finished or _is_done(checkpoint.parent):
            yield checkpoint


def _is_done(run: Path) -> bool:
    try:
        record = parse_json((run / "run.json").read_bytes(), source=str(run))
    except (FileNotFoundError, IntegrityError):  # verify reports a damaged one; its checkpoints are kept
        return False
    return isinstance(record, dict) and record.get("state") == "done"


def _seconds(moment: str, *, unknown: float) -> float:
    """Return a time as seconds since 1970; `unknown` if it cannot be parsed, so that nothing is deleted."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return unknown


def _is_older(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime < moment
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
