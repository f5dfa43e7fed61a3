"""Where a stored version came from, and where it was pushed to: a note beside its manifest.

    <store>/domains/<name>/origins/<n>.json

It is no part of the pack, so a pulled pack stays byte for byte what was pushed. By it a tag that was moved is noticed,
an update is told from a stranger's pack of the same name, and a pack that is here is found without a network.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ...domains.remote_ref import RemoteRef
from ..store.files import make_folder, write_atomic
from ..store.manifest import PackManifest
from ..store.store import Store
from ..store.strict_json import JsonObject, canonical_json, minor_of, parse_json, record_from_json, record_to_json

SCHEMA: Final = "lorary.origins/1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One version of a pack on the Hub."""

    endpoint: str  # address of the Hub
    repo: str
    commit: str
    name: str  # of its domain there
    version: int  # its number there
    digest: str  # content digest, as its manifest there has it
    time: str  # when it was first pulled or pushed, ISO 8601 in UTC
    extra: JsonObject = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{RemoteRef(self.repo)}@v{self.version}"


@dataclass(frozen=True, kw_only=True)
class OriginsRecord:
    """What the note says."""

    origins: tuple[Origin, ...]
    schema: str = SCHEMA
    extra: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Traced:
    """A stored version with one of its origins."""

    manifest: PackManifest
    origin: Origin


def note_origin(store: Store, manifest: PackManifest, origin: Origin) -> None:
    """Remember where a stored version came from, unless that is known."""
    known = origins_of(store, manifest)
    if any((o.endpoint, o.repo, o.commit) == (origin.endpoint, origin.repo, origin.commit) for o in known):
        return
    path = _path(store, manifest)
    make_folder(path.parent)
    write_atomic(path, canonical_json(record_to_json(OriginsRecord(origins=(*known, origin)))))


def origins_of(store: Store, manifest: PackManifest) -> tuple[Origin, ...]:
    """Where a stored version came from, and where it was pushed to.

    Raises:
        IntegrityError: The note cannot be read.
    """
    path = _path(store, manifest)
    try:
        value = parse_json(path.read_bytes(), source=str(path))
    except FileNotFoundError:
        return ()
    schema = value.get("schema") if isinstance(value, dict) else None
    minor = minor_of(schema, known=SCHEMA, source=str(path))
    record = record_from_json(OriginsRecord, value, source=str(path), keeps_unknown=minor > 0)
    # a note on another pack that once had the number says nothing of this one
    return tuple(o for o in record.origins if replace(manifest, name=o.name).digest == o.digest)


def traced_to(store: Store, *, endpoint: str, repo: str) -> list[Traced]:
    """The stored versions that came from a repository or were pushed to it, by their number there."""
    found = [traced for traced in _traced(store) if (traced.origin.endpoint, traced.origin.repo) == (endpoint, repo)]
    return sorted(found, key=lambda traced: traced.origin.version)


def _traced(store: Store) -> Iterator[Traced]:
    for name in store.domains():
        if (store.path / "domains" / name / "origins").is_dir():
            for version in store.versions(name):
                manifest = store.manifest(name, version)
                yield from (Traced(manifest, origin) for origin in origins_of(store, manifest))


def _path(store: Store, manifest: PackManifest) -> Path:
    return store.path / "domains" / manifest.name / "origins" / f"{manifest.version}.json"
