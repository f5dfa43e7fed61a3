"""Verify a store: every file of every version against its digest, packs against the strict reader, and aliases."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...domains.errors import IntegrityError, LoraryError
from ..store.manifest import MANIFEST_FILE, PackManifest
from ..store.store import Store
from ..store.versions import DomainFolder

State = Literal["ok", "bad", "missing"]
WHOLE_PACK = "(pack)"  # path of the check of all files together


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """Result of the check of one file."""

    name: str
    version: int | None  # None for a file of the domain
    path: str
    state: State
    size: int = 0  # bytes
    problem: str = ""

    @property
    def reference(self) -> str:
        """`name@version`, or the name if there is no version."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


def verify_version(store: Store, name: str, version: int, *, deep: bool = False) -> Iterator[FileCheck]:
    """Check every file of a version, its manifest first.

    All files are read from disk again.

    Args:
        deep: Also check that the files form a valid pack, with the strict reader.
    """
    try:
        manifest = store.manifest(name, version)
    except (LoraryError, OSError) as error:
        yield FileCheck(name=name, version=version, path=MANIFEST_FILE, state="bad", problem=_problem_of(error))
        return
    yield FileCheck(name=name, version=version, path=MANIFEST_FILE, state="ok", size=len(manifest.to_json()))
    is_whole = True
    for file in manifest.files:
        state, problem = _check_blob(store, file.sha256, size=file.size)
        is_whole &= state == "ok"
        yield FileCheck(name=name, version=version, path=file.path, state=state, size=file.size, problem=problem)
    if deep and is_whole:
        yield _check_whole_pack(store, manifest)


def verify_store(store: Store, *, deep: bool = False) -> Iterator[FileCheck]:
    """Check every version that is not removed, and that every alias points at a version."""
    for name in store.domains():
        for version in store.versions(name):
            yield from verify_version(store, name, version, deep=deep)
        yield from _check_aliases(store, name)


def _check_blob(store: Store, digest: str, *, size: int) -> tuple[State, str]:
    if digest not in store.blobs:
        return "missing", f"{store.blobs.path(digest)} does not exist"
    try:
        store.blobs.check(digest)
    except (IntegrityError, OSError) as error:
        return "bad", _problem_of(error)
    found = store.blobs.size(digest)
    return ("ok", "") if found == size else ("bad", f"{found} bytes, {size} in the manifest")


def _check_whole_pack(store: Store, manifest: PackManifest) -> FileCheck:
    from ..pack.check_pack import check_pack

    state: State = "ok"
    problem = ""
    try:
        check_pack(store, manifest)
    except LoraryError as error:
        state, problem = "bad", _problem_of(error)
    return FileCheck(name=manifest.name, version=manifest.version, path=WHOLE_PACK, state=state, problem=problem)


def _check_aliases(store: Store, name: str) -> Iterator[FileCheck]:
    numbers = DomainFolder(store.path, name).numbers()
    try:
        aliases = store.aliases(name)
    except (IntegrityError, OSError) as error:
        yield FileCheck(name=name, version=None, path="aliases", state="bad", problem=_problem_of(error))
        return
    for alias, version in aliases.items():
        if version not in numbers:
            problem = f"it points at version {version}, which does not exist"
            yield FileCheck(name=name, version=None, path=f"aliases/{alias}", state="bad", problem=problem)


def _problem_of(error: Exception) -> str:
    return (error.cause or error.message) if isinstance(error, LoraryError) else str(error)
