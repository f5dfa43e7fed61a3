"""Store: a folder with every version of every domain, as plain files.

    <store>/store.json                      written last by `create`: marks the store as complete
    <store>/blobs/sha256/ab/ab12...         the files of all packs, named by digest
    <store>/domains/<name>/<n>.json         the manifest of version n, immutable
    <store>/domains/<name>/removed/<n>      a tombstone, while version n is removed
    <store>/domains/<name>/aliases/<alias>  one line: the version it points to
    <store>/**/seals/                       digests of the small files above, see seals.py
    <store>/runs/  <store>/cache/           training runs; derived, disposable files
    <store>/ballast                         reserved space, freed to recover from a full disk

A version is committed when its manifest is linked to `<n>.json`, after every file it references is on disk. The link is
atomic; of two concurrent writers one gets the number and the other the next one. Readers take no lock.
"""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from ...adapters.composition import GENERAL, parse_reference
from ...domains.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    LoraryError,
    NotFoundError,
    StorageFullError,
)
from ...domains.names import check_alias, is_name, parse_selector
from .blobs import BlobStore
from .files import delete, make_folder, write_atomic, write_once
from .manifest import PackFile, PackManifest, check_path
from .seals import Seals
from .strict_json import JsonObject, canonical_json, minor_of, parse_json, record_from_json, record_to_json
from .versions import DomainFolder, collected_version, no_such_domain, no_such_store, no_such_version, removed_version

SCHEMA: Final = "lorary.store/1"
STORE_FILE: Final = "store.json"
LATEST: Final = "latest"
BALLAST: Final = "ballast"
BALLAST_SIZE: Final = 64 << 10  # bytes

OnUnreadable: TypeAlias = Callable[[str, LoraryError], None]  # what is left out, and why


def locate_store(explicit: str | Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """Return the store path: `explicit`, $LORARY_STORE, the nearest `.lorary` at or above `cwd`, or the default."""
    asked = explicit or environ.get("LORARY_STORE")
    if asked:
        return cwd / Path(asked).expanduser()
    for folder in (cwd, *cwd.parents):
        if (folder / ".lorary").is_dir():
            return folder / ".lorary"
    data_home = Path(environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG specification requires to ignore relative paths
        data_home = Path(environ.get("HOME") or Path.home()) / ".local" / "share"
    return data_home / "lorary"


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """Contents of store.json."""

    id: str  # random, so that a moved or copied store is recognised
    created: str  # time, ISO 8601 in UTC
    settings: dict[str, Any]
    schema: str = SCHEMA
    extra: JsonObject = field(default_factory=dict)


class Store:
    """Open store; use `create` or `open` to get one."""

    def __init__(self, path: Path, record: StoreRecord):
        self.path = path
        self.record = record
        self.blobs = BlobStore(path)

    @classmethod
    def create(cls, path: str | Path, settings: JsonObject) -> "Store":
        """Create a store in a folder, which may exist.

        Raises:
            ConflictError: The folder contains a store, or the path is a file.
        """
        root = Path(path).absolute()
        if (root / STORE_FILE).exists() or (root.exists() and not root.is_dir()):
            raise _taken_folder(root)
        for folder in ("", "blobs/sha256", "domains", "runs", "cache"):
            make_folder(root / folder)
        # random, because some file systems allocate no space for zeros
        write_atomic(root / BALLAST, os.urandom(BALLAST_SIZE))
        record = StoreRecord(id=os.urandom(16).hex(), created=_now(), settings=copy.deepcopy(settings))
        try:
            data = canonical_json(record_to_json(record))
            Seals(root).add(STORE_FILE, data)
            write_once(root / STORE_FILE, data)
        except FileExistsError as error:
            raise _taken_folder(root) from error
        return cls(root, record)

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open the store in a folder.

        Raises:
            NotFoundError: The folder contains no store.
            IncompatibleError: A newer program made it.
        """
        root = Path(path).absolute()
        source = root / STORE_FILE
        try:
            value = parse_json(Seals(root).read(STORE_FILE), source=str(source))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise no_such_store(root) from error
        schema = value.get("schema") if isinstance(value, dict) else None
        minor = minor_of(schema, known=SCHEMA, source=str(source))
        return cls(root, record_from_json(StoreRecord, value, source=str(source), keeps_unknown=minor > 0))

    @property
    def settings(self) -> JsonObject:
        """Copy of the settings passed to `create`."""
        return copy.deepcopy(self.record.settings)

    @property
    def runs(self) -> Path:
        """Folder of training runs."""
        return self.path / "runs"

    @property
    def cache(self) -> Path:
        """Folder of derived files, which may be deleted at any time."""
        return self.path / "cache"

    def drop_ballast(self) -> None:
        """Delete the ballast, to free its space on a full disk."""
        delete(self.path / BALLAST)

    def fill_ballast(self) -> None:
        """Write the ballast again if it is missing and there is space."""
        if not (self.path / BALLAST).exists():
            with suppress(StorageFullError):
                write_atomic(self.path / BALLAST, os.urandom(BALLAST_SIZE))

    def domains(self, *, removed: bool = False) -> list[str]:
        """Return the domains that have a version, sorted; with `removed`, also those with only removed versions."""
        names = sorted(name for name in os.listdir(self.path / "domains") if is_name(name))
        return [name for name in names if self.versions(name) or (removed and self.removed(name))]

    def versions(self, name: str) -> list[int]:
        """Return the versions of a domain that are not removed, ascending; empty for an unknown domain."""
        return DomainFolder(self.path, name).versions()

    def removed(self, name: str) -> dict[int, str]:
        """Return the removed versions of a domain, ascending, and when each was removed."""
        return DomainFolder(self.path, name).removed()

    def history(self, name: str) -> list[PackManifest]:
        """Return the manifests of all versions, including removed ones, ascending.

        Raises:
            NotFoundError: The domain never had a version.
        """
        numbers = DomainFolder(self.path, name).numbers()
        if not numbers:
            raise no_such_domain(name, known=self.domains())
        return [self._read(name, number) for number in numbers]

    def readable_history(self, name: str) -> tuple[list[PackManifest], dict[int, LoraryError]]:
        """Return the manifests of `history` that can be read, and why each other one cannot.

        Raises:
            NotFoundError: The domain never had a version.
        """
        numbers = DomainFolder(self.path, name).numbers()
        if not numbers:
            raise no_such_domain(name, known=self.domains())
        readable: list[PackManifest] = []
        unreadable: dict[int, LoraryError] = {}
        for number in numbers:
            try:
                readable.append(self._read(name, number))
            except LoraryError as error:
                unreadable[number] = error
        return readable, unreadable

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of a domain and the version that each points to."""
        return DomainFolder(self.path, name).aliases()

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point `alias` at `version`.

        Raises:
            InputError: The alias breaks the grammar of names.
            NotFoundError: There is no such version.
        """
        DomainFolder(self.path, name).set_alias(alias, self._resolve(name, version))

    def drop_alias(self, name: str, alias: str) -> None:
        """Delete an alias.

        Raises:
            InputError: The alias is `latest`, which every domain has.
            NotFoundError: There is no such domain or alias.
        """
        if alias == LATEST:
            raise InputError("'latest' cannot be deleted.", fix=f"Move it: registry alias {name}@VERSION latest")
        if alias not in self.aliases(name):
            self._resolve(name, alias)
        DomainFolder(self.path, name).drop_alias(alias)

    def check_removable(self, reference: str) -> PackManifest:
        """Return the manifest of a version that `remove` would remove.

        Raises:
            NotFoundError: There is no such version, or it is already removed.
            ConflictError: An alias other than `latest` points to it, or it belongs to the KP bank.
        """
        manifest = self.manifest(*parse_reference(reference))
        name, version = manifest.name, manifest.version
        if name == GENERAL:
            cause = "every domain of the registry was trained on top of it"
            raise ConflictError("The KP bank cannot be removed.", cause=cause)
        held_by = [alias for alias, meant in self.aliases(name).items() if meant == version and alias != LATEST]
        if held_by:
            raise ConflictError(
                f"{name}@{version} cannot be removed.",
                cause=f"aliases point to it: {', '.join(held_by)}",
                fix=f"Delete the alias: registry alias {name} {held_by[0]} --remove; or move it to another version",
            )
        return manifest

    def remove(self, reference: str) -> PackManifest:
        """Remove a version such as `legal@2` and return its manifest.

        Its files are kept until gc deletes them, and its number is never reused. If `latest` points to this version, it
        moves to the newest remaining version that is not held back.

        Raises:
            NotFoundError, ConflictError: See `check_removable`.
        """
        manifest = self.check_removable(reference)
        name, version = manifest.name, manifest.version
        folder = DomainFolder(self.path, name)
        now = datetime.now(UTC).isoformat(timespec="microseconds")  # finer than seconds: restore picks the last one
        try:
            folder.remove(version, time=now)
        except StorageFullError:  # removing must work on a full disk: free the ballast
            self.drop_ballast()
            folder.remove(version, time=now)
        self._repair_latest(name)
        return manifest

    def restore(self, reference: str) -> PackManifest:
        """Restore a removed version and return its manifest.

        A name alone selects the version removed last. Aliases are unchanged, except for a `latest` that still points to
        a removed version because no other was left.

        Raises:
            InputError: The reference has an alias, which never points to a removed version.
            NotFoundError: The version never existed, none is removed, or gc has deleted its files.
            ConflictError: The version is not removed.
        """
        name, selector = parse_reference(reference)
        folder = DomainFolder(self.path, name)
        version = self._last_removed(name) if selector is None else parse_selector(selector)
        if isinstance(version, str):
            raise InputError(f"{reference!r} names an alias.", fix=f"name the version: registry restore {name}@NUMBER")
        if version in folder.versions():
            raise ConflictError(f"{name}@{version} is not removed.", fix=f"See what there is: registry log {name}")
        if version not in folder.numbers():
            raise no_such_version(name, version, versions=folder.numbers(), aliases={})
        manifest = self._read(name, version)
        with self.blobs.lease():
            missing = [file.path for file in manifest.files if not self.blobs.renew(file.sha256)]
            if missing:
                raise collected_version(name, version, missing=missing, files=len(manifest.files))
            folder.restore(version)
        self._repair_latest(name)
        return manifest

    def manifest(self, name: str, selector: str | int | None = None) -> PackManifest:
        """Return the manifest of a version, selected by number or alias; `latest` by default.

        Raises:
            NotFoundError: There is no such domain, version or alias; the message lists those that exist.
            IntegrityError: The manifest file is invalid or belongs to another pack.
        """
        return self._read(name, self._resolve(name, LATEST if selector is None else selector))

    def _read(self, name: str, version: int) -> PackManifest:
        path = DomainFolder(self.path, name).manifest_path(version)
        manifest = PackManifest.from_json(DomainFolder(self.path, name).read_manifest(version), source=str(path))
        if (manifest.name, manifest.version) != (name, version):
            cause = f"Expected {name}@{version}, found {manifest.name}@{manifest.version}."
            raise IntegrityError(
                f"{path} is the manifest of another pack.", cause=cause, fix="Restore the file from a backup."
            )
        return manifest

    def commit(
        self,
        draft: PackManifest,
        files: Mapping[str, tuple[bytes, str]],
        *,
        first_only: bool = False,
        alias: str | None = LATEST,
    ) -> PackManifest:
        """Store a new version durably and return its manifest.

        If moving the alias fails after the commit point, the complete version remains stored.

        Args:
            draft: Manifest of the pack; its version and files are replaced.
            files: Path in the pack to bytes and kind, for every file except the manifest.
            first_only: Refuse to add a version to a domain that already has one.
            alias: Alias to move to the new version; None holds the version back.

        Raises:
            ConflictError: `first_only` is set and the domain has a version.
            IntegrityError: A value of the draft has the wrong type.
            StorageFullError: No space is left.
        """
        folder = DomainFolder(self.path, draft.name)
        if alias is not None:
            check_alias(alias)
        with self.blobs.lease():
            draft = replace(draft, files=self._put(files))
            # parse before the commit point, so that no unreadable manifest is stored
            draft = PackManifest.from_json(draft.to_json(), source=f"The draft of {draft.name}")
            try:
                version = folder.append(lambda n: replace(draft, version=n).to_json(), first_only=first_only)
            except FileExistsError as error:
                fix = f"Look at it: registry show {draft.name}; or choose another name"
                raise ConflictError(f"The domain {draft.name!r} is there already.", fix=fix) from error
            # a gc without locks moves blobs away before it reads the manifests: it has seen this one, or we see that
            for data, _kind in files.values():
                self.blobs.put_if_missing(data)
        if alias is not None:
            folder.advance_alias(alias, version)
        self._repair_latest(draft.name)
        return replace(draft, version=version)

    def adopt(self, manifest: PackManifest, *, alias: str | None) -> PackManifest:
        """Store a version made elsewhere whose files are already blobs of this store; return its stored manifest.

        It keeps its number if that is free, and gets the next one otherwise. A version with the same content is not
        stored twice; if it was removed, it is restored.

        Args:
            manifest: Complete, with files and version.
            alias: Alias to move to it, unless it points to a later version; None holds the version back.

        Raises:
            IntegrityError: A blob is missing or damaged.
            StorageFullError: No space is left.
        """
        with self.blobs.lease():
            self._check_blobs(manifest, [f for f in manifest.files if not self.blobs.holds(f.sha256, size=f.size)])
            stored = self._adopt(manifest, alias=alias)
            # see commit; here the version stays, and the repeated command brings its blobs again
            self._check_blobs(manifest, [f for f in manifest.files if f.sha256 not in self.blobs])
        self._repair_latest(manifest.name)
        return stored

    def _adopt(self, manifest: PackManifest, *, alias: str | None) -> PackManifest:
        folder = DomainFolder(self.path, manifest.name)
        while (stored := self.find_same(manifest)) is None:
            numbers = folder.numbers()
            if removed := self._same(manifest, numbers):
                number = removed.version
                folder.restore(number)
            else:
                is_free = manifest.version > 0 and manifest.version not in numbers
                number = manifest.version if is_free else max(numbers, default=0) + 1
                try:
                    folder.link(number, replace(manifest, version=number).to_json())
                except FileExistsError:  # another process took the number: check again
                    continue
            if alias is not None:
                folder.advance_alias(alias, number)
        return stored

    @staticmethod
    def _check_blobs(manifest: PackManifest, lacking: list[PackFile]) -> None:
        if lacking:
            cause = f"missing or damaged in the store: {', '.join(file.path for file in lacking)}"
            raise IntegrityError(f"The pack {manifest.name} is not complete.", cause=cause, fix="repeat the command")

    def find_same(self, manifest: PackManifest) -> PackManifest | None:
        """Return the version of the domain with the same content, or None; removed versions are ignored."""
        return self._same(manifest, self.versions(manifest.name))

    def _same(self, manifest: PackManifest, numbers: list[int]) -> PackManifest | None:
        stored = (self._read(manifest.name, number) for number in numbers)
        return next((version for version in stored if version.digest == manifest.digest), None)

    def read(self, manifest: PackManifest, path: str) -> bytes:
        """Return a file of a pack, verified.

        Raises:
            NotFoundError: The pack has no such file.
            IntegrityError: The file is missing or damaged.
        """
        return self.blobs.get(manifest.file(path).sha256)

    def verify(self, manifest: PackManifest) -> None:
        """Check the bytes of every file of a pack.

        Raises:
            IntegrityError: Files are damaged; the message names each of them.
        """
        problems = []
        for file in manifest.files:
            try:
                self.blobs.check(file.sha256)
            except IntegrityError as error:
                problems.append(f"{file.path}: {error.message} {error.cause}")
        if problems:
            title = f"{manifest.name}@{manifest.version}: {len(problems)} of {len(manifest.files)} files are damaged."
            raise IntegrityError(
                title,
                cause="\n".join(problems),
                fix="Restore the files from a backup, or add the domain again to a new registry.",
            )

    def _resolve(self, name: str, selector: str | int) -> int:
        """Return the version number that a selector refers to."""
        wanted = parse_selector(selector) if isinstance(selector, str) else selector
        folder = DomainFolder(self.path, name)
        versions, numbers = folder.versions(), folder.numbers()
        if wanted in versions:
            return int(wanted)
        if not numbers:
            raise no_such_domain(name, known=self.domains())
        aliases = self.aliases(name)
        version = wanted if isinstance(wanted, int) else aliases.get(wanted)
        if wanted == LATEST and version not in versions and versions:
            # a process killed between commit point and alias update leaves `latest` stale
            return self._newest(name)
        if version in versions:
            return version
        if version in numbers or wanted == LATEST:
            raise removed_version(name, numbers[-1] if version is None else version)
        raise no_such_version(name, selector, versions=versions, aliases=aliases)

    def _newest(self, name: str) -> int:
        """Return the newest version that is not held back, or the newest of all if every one is."""
        versions = self.versions(name)
        return next((n for n in reversed(versions) if not self._read(name, n).is_held_back), versions[-1])

    def _repair_latest(self, name: str) -> None:
        """Point `latest` at the newest version if it points to a removed one, as after an interrupted removal."""
        folder = DomainFolder(self.path, name)
        live = folder.versions()
        if live and folder.alias_or_zero(LATEST) not in (0, *live):
            folder.set_alias(LATEST, self._newest(name), when=lambda version: version not in folder.versions())

    def _last_removed(self, name: str) -> int:
        removed = self.removed(name)
        if not removed:
            raise NotFoundError(f"No version of {name!r} is removed.", fix=f"See what there is: registry log {name}")
        return max(removed, key=lambda number: (removed[number], number))

    def _put(self, files: Mapping[str, tuple[bytes, str]]) -> tuple[PackFile, ...]:
        for path in files:
            check_path(path)
        return tuple(
            PackFile(path=path, size=len(data), sha256=self.blobs.put(data), kind=kind)
            for path, (data, kind) in sorted(files.items())
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _taken_folder(root: Path) -> ConflictError:
    cause = "There is a registry in it." if (root / STORE_FILE).exists() else "It is a file, not a folder."
    return ConflictError(
        f"{root} is taken.", cause=cause, fix="Use it, or choose another folder: registry init --store PATH"
    )
