"""Verify a store: every file against its digest or seal, and packs against the strict reader."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

from ...domains.errors import IntegrityError, LoraryError
from ...domains.names import is_name
from ..store.manifest import MANIFEST_FILE, PackManifest
from ..store.seals import Seals
from ..store.store import STORE_FILE, Store
from ..store.strict_json import canonical_json, parse_json
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
    data = DomainFolder(store.path, name).manifest_path(manifest.version).read_bytes()
    is_canonical = manifest.to_json() == data
    yield FileCheck(
        name=name,
        version=version,
        path=MANIFEST_FILE,
        state="ok" if is_canonical else "bad",
        size=len(data),
        problem="" if is_canonical else "it is not canonical JSON",
    )
    is_whole = True
    for file in manifest.files:
        state, problem = _check_blob(store, file.sha256, size=file.size)
        is_whole &= state == "ok"
        yield FileCheck(name=name, version=version, path=file.path, state=state, size=file.size, problem=problem)
    if deep and is_whole:
        yield _check_whole_pack(store, manifest)


def verify_store(store: Store, *, deep: bool = False) -> Iterator[FileCheck]:
    """Check every version that is not removed, and every small file of the store.

    Of the small files, only the damaged ones have an entry, but for manifests of versions that are not removed.
    """
    reported = set()
    for name in store.domains():
        for version in store.versions(name):
            for one in verify_version(store, name, version, deep=deep):
                reported.add((one.name, one.version, one.path))
                yield one
    yield from (one for one in check_small_files(store) if (one.name, one.version, one.path) not in reported)


def check_small_files(store: Store) -> Iterator[FileCheck]:
    """Check every manifest, alias, tombstone, record of a run or origin, and store.json; yield the damaged ones."""
    for file in _small_files(store):
        try:
            file.check(file.seals.read(file.key))
        except FileNotFoundError:  # deleted by another process
            continue
        except (LoraryError, OSError, ValueError) as error:
            yield FileCheck(
                name=file.name, version=file.version, path=file.path, state="bad", problem=_problem_of(error)
            )


def unsealed_files(store: Store) -> list[Path]:
    """Return the small files without a seal: damage that leaves them well-formed would not be noticed."""
    return [file.seals.folder / file.key for file in _small_files(store) if not file.seals.of(file.key)]


def seal_store(store: Store) -> int:
    """Seal every small file that has no seal and is well-formed; return how many were sealed."""
    sealed = 0
    for file in _small_files(store):
        with suppress(LoraryError, ValueError, FileNotFoundError):  # verify reports what is not well-formed
            sealed += file.seals.seal(file.key, check=file.check)
    return sealed


@dataclass(frozen=True)
class _SmallFile:
    """A file that has a seal, or should have one."""

    name: str  # of the domain, or of the folder in the store
    version: int | None
    path: str  # as reports name it
    seals: Seals
    key: str  # its name in the seals' folder
    check: Callable[[bytes], object]  # raises where bytes are not well-formed


def _small_files(store: Store) -> Iterator[_SmallFile]:
    root = Seals(store.path)
    yield _SmallFile(STORE_FILE, None, STORE_FILE, root, STORE_FILE, partial(_check_record, source=STORE_FILE))
    for name in sorted(name for name in os.listdir(store.path / "domains") if is_name(name)):
        folder = DomainFolder(store.path, name)
        numbers = folder.numbers()
        for path in folder.files():
            key = path.relative_to(folder.path).as_posix()
            if key == f"{path.stem}.json":
                check = partial(_check_manifest, name=name, version=int(path.stem))
                yield _SmallFile(name, int(path.stem), MANIFEST_FILE, folder.seals, key, check)
            else:
                check = partial(_check_alias, numbers=numbers) if key.startswith("aliases/") else _check_time
                yield _SmallFile(name, None, key, folder.seals, key, check)
        yield from _records(folder.path / "origins", name=name, prefix="origins/")
    for run in sorted(path for path in store.runs.iterdir() if path.is_dir()) if store.runs.is_dir() else ():
        yield from _records(run, name="runs", prefix=f"{run.name}/")


def _records(folder: Path, *, name: str, prefix: str) -> Iterator[_SmallFile]:
    """Yield the JSON files of a folder, and whatever else of it is sealed."""
    seals = Seals(folder)
    keys = {path.name for path in folder.glob("*.json")} | {key for key in seals.all() if (folder / key).is_file()}
    for key in sorted(keys):
        check = partial(_check_record, source=key) if key.endswith(".json") else bytes
        yield _SmallFile(name, None, prefix + key, seals, key, check)


def _check_manifest(data: bytes, *, name: str, version: int) -> None:
    manifest = PackManifest.from_json(data, source=MANIFEST_FILE)
    if (manifest.name, manifest.version) != (name, version):
        raise ValueError(f"it is the manifest of {manifest.name}@{manifest.version}")
    if manifest.to_json() != data:
        raise ValueError("it is not canonical JSON")


def _check_record(data: bytes, *, source: str) -> None:
    if canonical_json(parse_json(data, source=source)) != data:
        raise ValueError("it is not canonical JSON")


def _check_alias(data: bytes, *, numbers: list[int]) -> None:
    text = data.decode("ascii")
    if not text.endswith("\n") or not text[:-1].isdecimal():
        raise ValueError(f"expected one line with a version, found {data[:40]!r}")
    if int(text) not in numbers:
        raise ValueError(f"it points at version {int(text)}, which does not exist")


def _check_time(data: bytes) -> None:
    text = data.decode("ascii")
    if not text.endswith("\n"):
        raise ValueError(f"expected one line with a time, found {data[:40]!r}")
    datetime.fromisoformat(text[:-1])


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


def _problem_of(error: Exception) -> str:
    return (error.cause or error.message) if isinstance(error, LoraryError) else str(error)
