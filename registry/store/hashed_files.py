"""Cache of verified blobs, so that files unchanged since their last check are not hashed again.

    <store>/cache/verified.json      digest of a blob -> state of its file when it was verified

The state is inode, size, mtime and ctime; the file system updates ctime at every write, and users cannot set it.
Timestamps are coarse, so an entry whose file changed shortly before the cache was written is ignored: a second write
right after the first would look the same (git handles its index likewise). Files without a valid entry are hashed. The
cache does not detect silent corruption by the disk; `Store.verify` hashes every file.
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
COARSEST_NS: Final = 2_000_000_000  # coarsest timestamp resolution in use: FAT has two seconds


def check_files(store: Store, manifests: Iterable[PackManifest]) -> int:
    """Verify every file of these packs against its manifest, and return how many files were hashed.

    Removed versions are left out: gc may have deleted their files, and no composition uses them.

    Raises:
        IntegrityError: Files are damaged; the message names each of them.
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
                if _is_removed(store, manifest):  # removed just now, and collected by a gc without grace period
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
    except OSError:  # the verification reports the problem
        return None
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _believed(store: Store) -> Mapping[str, str]:
    """Return the cached states whose ctime is clearly older than the cache file."""
    path = store.cache / CACHE_FILE
    try:
        newest = path.stat().st_mtime_ns - COARSEST_NS
        states = json.loads(path.read_text(encoding="utf-8"))
        return {digest: state for digest, state in states.items() if int(state.rpartition(" ")[2]) < newest}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(store: Store, states: dict[str, str]) -> None:
    """Write the cache; states were read before hashing, so a write in between is detected next time."""
    if os.access(store.cache, os.W_OK):
        write_atomic(store.cache / CACHE_FILE, canonical_json(states))
