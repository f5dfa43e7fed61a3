"""Folder of one domain in a store: the numbered manifests of its versions, and its aliases.

<n>.json            the manifest of version n; linked once, immutable
removed/<n>         a tombstone with the time of removal; deleted when version n is restored
aliases/<alias>     one line: the version it points to; replaced by rename
seals/              the digests of all these files, see seals.py

A removed version keeps its manifest, so its number is never reused.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from ...domains.data.catalog import builtin_domains
from ...domains.errors import IntegrityError, NotFoundError
from ...domains.names import NAME_PATTERN, VERSION_PATTERN, check_alias, check_name
from .files import delete, folder_lock, make_folder, write_once
from .seals import Seals

_MANIFEST_NAME: Final = re.compile(rf"({VERSION_PATTERN})\.json")
_LISTED: Final = 20
UNKNOWN_TIME: Final = "unknown"


class DomainFolder:
    """Versions and aliases of one domain, which need not exist yet."""

    def __init__(self, store: Path, name: str):
        self.path = store / "domains" / check_name(name)
        self.seals = Seals(self.path)

    def numbers(self) -> list[int]:
        """Return the numbers of all versions, including removed ones, ascending."""
        matches = (_MANIFEST_NAME.fullmatch(entry) for entry in _entries(self.path))
        return sorted(int(match[1]) for match in matches if match)

    def versions(self) -> list[int]:
        """Return the versions that are not removed, ascending."""
        removed = set(_entries(self.path / "removed"))
        return [number for number in self.numbers() if str(number) not in removed]

    def removed(self) -> dict[int, str]:
        """Return the removed versions, ascending, and when each was removed; "unknown" where that line is damaged."""
        removed = {}
        for version in self.numbers():
            try:
                removed[version] = self.seals.read(f"removed/{version}").decode().strip()
            except FileNotFoundError:
                continue
            except (IntegrityError, UnicodeDecodeError):
                removed[version] = UNKNOWN_TIME
        return removed

    def read_manifest(self, version: int) -> bytes:
        """Return the bytes of a version's manifest.

        Raises:
            IntegrityError: They differ from what was committed.
        """
        return self.seals.read(f"{version}.json")

    def files(self) -> list[Path]:
        """Return the manifests, aliases and tombstones, sorted within each kind."""
        aliases = (name for name in _entries(self.path / "aliases") if re.fullmatch(NAME_PATTERN, name))
        tombstones = (name for name in _entries(self.path / "removed") if re.fullmatch(VERSION_PATTERN, name))
        return [
            *(self.manifest_path(number) for number in self.numbers()),
            *(self.path / "aliases" / name for name in sorted(aliases)),
            *(self.path / "removed" / name for name in sorted(tombstones, key=int)),
        ]

    def manifest_path(self, version: int) -> Path:
        """Return the path of a version's manifest; it need not exist."""
        return self.path / f"{version}.json"

    def append(self, manifest_of: Callable[[int], bytes], *, first_only: bool) -> int:
        """Link a manifest to the next free number and return that number: the commit point.

        Raises:
            FileExistsError: `first_only` is set and the domain has a version.
        """
        while True:
            version = max(self.numbers(), default=0) + 1
            if first_only and self.versions():
                raise FileExistsError(self.manifest_path(version - 1))
            # another writer may take the number first: try the next one
            with suppress(FileExistsError):
                self.link(version, manifest_of(version))
                return version

    def remove(self, version: int, *, time: str) -> None:
        """Write a version's tombstone, the commit point of a removal; keep an existing one."""
        make_folder(self.path / "removed")
        line = f"{time}\n".encode()
        self.seals.add(f"removed/{version}", line)
        with suppress(FileExistsError):
            write_once(self.path / "removed" / str(version), line)

    def restore(self, version: int) -> None:
        """Delete a version's tombstone, the commit point of a restore."""
        delete(self.path / "removed" / str(version))
        self.seals.drop(f"removed/{version}")

    def link(self, version: int, manifest: bytes) -> None:
        """Link a manifest to a version number, the commit point of a new version.

        Raises:
            FileExistsError: The number is taken.
        """
        make_folder(self.path)
        self.seals.add(f"{version}.json", manifest)
        write_once(self.manifest_path(version), manifest)

    def aliases(self) -> dict[str, int]:
        """Return the aliases, sorted, and the version that each points to.

        Raises:
            IntegrityError: An alias file does not contain a version.
        """
        folder = self.path / "aliases"
        names = sorted(name for name in _entries(folder) if re.fullmatch(NAME_PATTERN, name))
        found = {}
        for name in names:
            with suppress(FileNotFoundError):  # deleted by another process
                found[name] = self._read_alias(folder / name)
        return found

    def alias_or_zero(self, alias: str) -> int:
        """Return the version that an alias points to, or 0 if it is missing or damaged; a commit replaces both."""
        try:
            return self._read_alias(self.path / "aliases" / alias)
        except (FileNotFoundError, IntegrityError):
            return 0

    def set_alias(self, alias: str, version: int, *, when: Callable[[int], bool] = lambda _meant: True) -> None:
        """Point `alias` at `version` if `when(current)` holds; `current` is 0 if the alias is missing or damaged."""
        path = self._make_alias_folder() / check_alias(alias)
        with folder_lock(path.parent):
            if when(self.alias_or_zero(alias)):
                self.seals.write(f"aliases/{alias}", f"{version}\n".encode())

    def advance_alias(self, alias: str, version: int) -> None:
        """Point `alias` at `version` unless it points to a higher one, so that the later of concurrent commits wins.

        On a file system without locks, the alias may stay on the earlier of the two; nothing else can go wrong.
        """
        self.set_alias(alias, version, when=lambda meant: meant < version)

    def drop_alias(self, alias: str) -> None:
        """Delete an alias."""
        path = self._make_alias_folder() / check_alias(alias)
        with folder_lock(path.parent):
            delete(path)
            self.seals.drop(f"aliases/{alias}")

    def _read_alias(self, path: Path) -> int:
        fix = f"Set it again: registry alias {self.path.name}@VERSION {path.name}"
        try:
            data = self.seals.read(f"aliases/{path.name}")
        except IntegrityError as error:
            raise IntegrityError(f"The alias {path} is damaged.", cause=error.cause, fix=fix) from error
        if not re.fullmatch(VERSION_PATTERN.encode() + rb"\n", data):
            cause = f"Expected one line with a version, found {data[:40]!r}."
            raise IntegrityError(f"The alias {path} is damaged.", cause=cause, fix=fix)
        return int(data)

    def _make_alias_folder(self) -> Path:
        folder = self.path / "aliases"
        make_folder(folder)
        return folder


def no_such_store(path: Path) -> NotFoundError:
    """Return the error for a folder that is not a store."""
    return NotFoundError(f"There is no store in {path}.", fix=f"Make one: registry init --store {path}")


def no_such_domain(name: str, *, known: list[str]) -> NotFoundError:
    """Return the error for a domain that has no version."""
    data = "" if name in builtin_domains() else " --data FILE"
    return NotFoundError(
        f"There is no domain named {name!r}.",
        cause=f"Known domains: {_listed(known)}.",
        fix=_did_you_mean(name, known) or f"Add it: registry add-domain {name}{data}",
    )


def removed_version(name: str, version: int) -> NotFoundError:
    """Return the error for a removed version."""
    return NotFoundError(
        f"{name}@{version} was removed.",
        cause="Its files are kept until gc deletes them, its number is never used again.",
        fix=f"Bring it back: registry restore {name}@{version}",
    )


def collected_version(name: str, version: int, *, missing: list[str], files: int) -> NotFoundError:
    """Return the error for a removed version whose files gc has deleted."""
    return NotFoundError(
        f"{name}@{version} cannot be restored.",
        cause=f"It was removed, and gc has since deleted {len(missing)} of its {files} files: {_listed(missing)}.",
        fix=f"Pull it again, or train a new version from its text: registry add-domain {name} --data FILE",
    )


def no_such_version(name: str, wanted: str | int, *, versions: list[int], aliases: Mapping[str, int]) -> NotFoundError:
    """Return the error for a version or alias that does not exist in a known domain."""
    described = [f"{alias} = {version}" for alias, version in aliases.items()]
    return NotFoundError(
        f"There is no {name}@{wanted}.",
        cause=f"Known versions: {_listed(map(str, versions))}. Aliases: {_listed(described)}.",
        fix=_did_you_mean(str(wanted), list(aliases)) or f"See what there is: registry show {name}",
    )


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    shown = items[:_LISTED]
    rest = len(items) - len(shown)
    return (", ".join(shown) or "none") + (f" and {rest} more" if rest else "")


def _did_you_mean(name: str, known: list[str]) -> str | None:
    matches = get_close_matches(name, known)
    return f"Did you mean {' or '.join(matches)}?" if matches else None
