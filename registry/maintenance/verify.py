"""verify: whether everything that the store says it has is there, byte for byte, and means what it says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...domains.errors import IntegrityError, LoraryError
from ..store.manifest import MANIFEST_FILE, PackManifest
from ..store.store import Store
from ..store.versions import DomainFolder

State = Literal["ok", "bad", "missing"]
PACK = "(pack)"  # stands for all files together, where they are proved to belong together


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What was found of one file."""

    name: str
    version: int | None  # None where it belongs to the domain as a whole
    path: str
    state: State
    size: int = 0  # bytes
    problem: str = ""

    @property
    def reference(self) -> str:
        """`name@version`, or the name alone."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


def verify_version(store: Store, name: str, version: int, *, deep: bool = False) -> Iterator[FileCheck]:
    """Every file of a version, its manifest first; with `deep` also whether the strict reader takes the pack.

    Each file is read once more from the disk, whatever was read before.
    """
    try:
        manifest = store.manifest(name, version)
    except (LoraryError, OSError) as error:
        yield FileCheck(name=name, version=version, path=MANIFEST_FILE, state="bad", problem=_problem(error))
        return
    yield FileCheck(name=name, version=version, path=MANIFEST_FILE, state="ok", size=len(manifest.to_json()))
    is_whole = True
    for file in manifest.files:
        state, problem = _state(store, file.sha256, size=file.size)
        is_whole &= state == "ok"
        yield FileCheck(name=name, version=version, path=file.path, state=state, size=file.size, problem=problem)
    if deep and is_whole:
        yield _proved(store, manifest)


def verify_store(store: Store, *, deep: bool = False) -> Iterator[FileCheck]:
    """The same of every version that is not removed, and whether every alias means a version."""
    for name in store.domains():
        for version in store.versions(name):
            yield from verify_version(store, name, version, deep=deep)
        yield from _aliases(store, name)


def _state(store: Store, digest: str, *, size: int) -> tuple[State, str]:
    if digest not in store.blobs:
        return "missing", f"there is no {store.blobs.path(digest)}"
    try:
        store.blobs.check(digest)
    except (IntegrityError, OSError) as error:
        return "bad", _problem(error)
    found = store.blobs.size(digest)
    return ("ok", "") if found == size else ("bad", f"it has {found} bytes, the manifest says {size}")


def _proved(store: Store, manifest: PackManifest) -> FileCheck:
    from ..pack.check_pack import check_pack

    state: State = "ok"
    problem = ""
    try:
        check_pack(store, manifest)
    except LoraryError as error:
        state, problem = "bad", _problem(error)
    return FileCheck(name=manifest.name, version=manifest.version, path=PACK, state=state, problem=problem)


def _aliases(store: Store, name: str) -> Iterator[FileCheck]:
    numbers = DomainFolder(store.path, name).numbers()
    try:
        aliases = store.aliases(name)
    except (IntegrityError, OSError) as error:
        yield FileCheck(name=name, version=None, path="aliases", state="bad", problem=_problem(error))
        return
    for alias, version in aliases.items():
        if version not in numbers:
            problem = f"it means version {version}, which was never stored"
            yield FileCheck(name=name, version=None, path=f"aliases/{alias}", state="bad", problem=problem)


def _problem(error: Exception) -> str:
    return (error.cause or error.message) if isinstance(error, LoraryError) else str(error)
