"""Origins of stored versions: the Hub repositories and commits that a version was pulled from or pushed to.

    <store>/domains/<name>/origins/<n>.json

The file is not part of the pack, so a pulled pack stays byte for byte what was pushed. It is used to detect moved tags,
to tell an update from an unrelated pack of the same name, and to find a pulled pack without a network.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ...domains.remote_ref import RemoteRef
from ..store.files import make_folder
from ..store.manifest import PackManifest
from ..store.seals import write_sealed
from ..store.store import Store
from ..store.strict_json import JsonObject, canonical_json, minor_of, parse_json, record_from_json, record_to_json

SCHEMA: Final = "lorary.origins/1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A pack version at one commit on the Hub."""

    endpoint: str  # URL of the Hub
    repo: str
    commit: str
    name: str  # domain name there
    version: int  # version number there
    digest: str  # content digest of the manifest there
    time: str  # of the first pull or push, ISO 8601 in UTC
    extra: JsonObject = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{RemoteRef(self.repo)}@v{self.version}"


@dataclass(frozen=True, kw_only=True)
class OriginsRecord:
    """Content of an origins file."""

    origins: tuple[Origin, ...]
    schema: str = SCHEMA
    extra: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class StoredVersion:
    """Stored version and one of its origins."""

    manifest: PackManifest
    origin: Origin


def record_origin(store: Store, manifest: PackManifest, origin: Origin) -> None:
    """Add an origin to a stored version unless it is recorded already."""
    known = origins_of(store, manifest)
    if any((o.endpoint, o.repo, o.commit) == (origin.endpoint, origin.repo, origin.commit) for o in known):
        return
    path = _path(store, manifest)
    make_folder(path.parent)
    write_sealed(path, canonical_json(record_to_json(OriginsRecord(origins=(*known, origin)))))


def origins_of(store: Store, manifest: PackManifest) -> tuple[Origin, ...]:
    """Return the recorded origins of a stored version.

    Raises:
        IntegrityError: The origins file cannot be parsed.
    """
    path = _path(store, manifest)
    try:
        value = parse_json(path.read_bytes(), source=str(path))
    except FileNotFoundError:
        return ()
    schema = value.get("schema") if isinstance(value, dict) else None
    minor = minor_of(schema, known=SCHEMA, source=str(path))
    record = record_from_json(OriginsRecord, value, source=str(path), keeps_unknown=minor > 0)
    # skip origins of another pack that once had this version number
    return tuple(o for o in record.origins if replace(manifest, name=o.name).digest == o.digest)


def versions_of_repo(store: Store, *, endpoint: str, repo: str) -> list[StoredVersion]:
    """Return the stored versions that were pulled from or pushed to a repository, sorted by their number there."""
    found = [
        stored for stored in _all_versions(store) if (stored.origin.endpoint, stored.origin.repo) == (endpoint, repo)
    ]
    return sorted(found, key=lambda stored: stored.origin.version)


def _all_versions(store: Store) -> Iterator[StoredVersion]:
    for name in store.domains():
        if (store.path / "domains" / name / "origins").is_dir():
            for version in store.versions(name):
                manifest = store.manifest(name, version)
                yield from (StoredVersion(manifest, origin) for origin in origins_of(store, manifest))


def _path(store: Store, manifest: PackManifest) -> Path:
    return store.path / "domains" / manifest.name / "origins" / f"{manifest.version}.json"
