"""Which stored files were hashed and have not been written to since, so that they need not be hashed again.

    <store>/cache/verified.json      digest of a blob -> the state of its file when its bytes had that digest

The state is inode, size, time of modification and time of change; the last is set by the file system at every write and
cannot be set by hand. Times are coarse: a file that was written shortly before the cache is not believed, because a
second write right after the first would look the same (as git does with its index). A file that is not believed is
hashed. What this cannot see is a disk that gives other bytes than were written; `Store.verify` hashes them all.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Final

from ...domains.errors import IntegrityError
from .files import write_atomic
from .manifest import PackManifest
from .store import Store
from .strict_json import canonical_json

CACHE_FILE: Final = "verified.json"
COARSEST_NS: Final = 2_000_000_000  # of all file systems that are in use: FAT counts in two seconds


def check_files(store: Store, manifests: Iterable[PackManifest]) -> int:
    """Make sure that every file of these packs has the bytes that its manifest names; return how many were hashed.

    Removed versions are left out: gc may have deleted their files, and no composition uses them.

    Raises:
        IntegrityError: Some are damaged; names each of them.
    """
    believed = _believed(store)
    seen: dict[str, str] = {}
    hashed = 0
    for manifest in manifests:
        if _is_removed(store, manifest):
            continue
        states = {file.sha256: _state(store, file.sha256) for file in manifest.files}
        if any(state is None or believed.get(digest) != state for digest, state in states.items()):
            try:
                store.verify(manifest)
            except IntegrityError:
                if _is_removed(store, manifest):  # just now, and a gc without grace period followed
                    continue
                raise
            hashed += len(states)
        seen |= {digest: state for digest, state in states.items() if state is not None}
    if hashed:
        _remember(store, seen)
    return hashed


def _is_removed(store: Store, manifest: PackManifest) -> bool:
    return manifest.version not in store.versions(manifest.name)


def _state(store: Store, digest: str) -> str | None:
    try:
        status = store.blobs.path(digest).stat()
    except OSError:  # verifying it says what is wrong
        return None
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _believed(store: Store) -> Mapping[str, str]:
    """The states in the cache that are clearly older than the cache itself."""
    path = store.cache / CACHE_FILE
    try:
        newest = path.stat().st_mtime_ns - COARSEST_NS
        states = json.loads(path.read_text(encoding="utf-8"))
        return {digest: state for digest, state in states.items() if int(state.rpartition(" ")[2]) < newest}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(store: Store, states: dict[str, str]) -> None:
    """The state was read before the file was hashed, so a write in between is noticed the next time."""
    if os.access(store.cache, os.W_OK):
        write_atomic(store.cache / CACHE_FILE, canonical_json(states))
