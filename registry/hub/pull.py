"""Pull one version of a pack from the Hub into the store, verified, or change nothing.

The revision is resolved once, and everything is read at that commit. Each file is checked against the manifest and
stored as a blob, so an interrupted pull resumes. The version is committed only when all files are there and pass the
strict reader (registry/pack/check_pack.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ...adapters.composition import GENERAL
from ...domains.errors import ConflictError, InputError, IntegrityError
from ...domains.names import check_name
from ...domains.progress import OnProgress, Progress
from ...domains.remote_ref import RemoteRef
from ..pack.check_manifest import check_manifest
from ..pack.signing import MAX_SIGNATURE, SIGNATURE_FILE, check_signature
from ..store.blobs import sha256_of
from ..store.manifest import BaseRecord, PackFile, PackManifest, check_same_base
from ..store.store import LATEST, Store
from .client import Hub, RemoteFile, Snapshot
from .origins import Origin, StoredVersion, record_origin, versions_of_repo

Preservation = Literal["same", "other", "unknown"]


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """Result of a pull."""

    manifest: PackManifest  # as stored
    origin: Origin
    is_new: bool  # whether a version was stored
    is_latest: bool  # whether the alias `latest` points at it
    fetched: tuple[PackFile, ...]  # files that were not in the store
    preservation: Preservation  # whether the KP bank it was trained over is in the store
    is_checked: bool  # whether the Hub was contacted; False offline
    is_signed: bool = False  # whether a signature was required, and is valid


def pull(
    store: Store,
    base: BaseRecord,
    ref: RemoteRef,
    *,
    hub: Hub,
    name: str | None = None,
    signer: Path | None = None,
    on_progress: OnProgress,
) -> PullResult:
    """Pull a version into the store; files and versions that are stored already are not fetched again.

    Args:
        store: Destination.
        base: Base model of the store.
        ref: Repository and revision.
        hub: Connection to the Hub.
        name: Domain name to store it under; None for its own.
        signer: Public key that must have signed the pack.
        on_progress: Called with the bytes fetched.

    Raises:
        RemoteError: The pack cannot be downloaded.
        IncompatibleError: It was made for another base model.
        IntegrityError: A file does not match the manifest, the pack is not valid, a version differs from the one
            pulled before, or the required signature is missing or not valid.
        ConflictError: A domain of this name exists that was not pulled from this repository.
        InputError: A KP bank would become another domain than `general`, or another domain `general`.
    """
    snapshot = hub.snapshot(ref)
    theirs = hub.manifest(snapshot, revision=ref.revision or "main")
    check_manifest(theirs)
    ours = replace(theirs, name=check_name(name)) if name else theirs
    check_same_base(wanted=theirs.base, found=base, what=f"{ref.repo}, version {theirs.version},")
    if theirs.version < 1:
        raise IntegrityError(
            f"{ref.repo} contains a draft.", cause="the manifest has version 0", fix="report it to the publisher"
        )
    _check_role(ours)
    _check_file_list(theirs, snapshot)
    known = versions_of_repo(store, endpoint=hub.endpoint, repo=ref.repo)
    _check_not_rewritten(theirs, ref, snapshot, known)
    stored = store.find_same(ours)
    if stored is None:
        _check_name(store, ours, known, repo=ref.repo)
    signature = _fetch_signature(snapshot, hub) if signer else b""
    fetched = tuple(_fetch_missing(store, snapshot, theirs, hub, on_progress))
    if signer:
        check_signature(store, theirs, signature, signer)
    manifest = stored or _check_and_adopt(store, ours, known)
    origin = Origin(
        endpoint=hub.endpoint,
        repo=ref.repo,
        commit=snapshot.commit,
        name=theirs.name,
        version=theirs.version,
        digest=theirs.digest,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    record_origin(store, manifest, origin)
    return PullResult(
        manifest=manifest,
        origin=origin,
        is_new=stored is None,
        is_latest=store.manifest(manifest.name).version == manifest.version,
        fetched=fetched,
        preservation=preservation_of(store, manifest),
        is_checked=not hub.offline,
        is_signed=signer is not None,
    )


def parse_source(source: str, revision: str | None) -> RemoteRef:
    """Parse a pack reference, whose revision may be given in `source` or separately.

    Raises:
        InputError: It cannot be parsed, or the revision is given twice.
    """
    ref = RemoteRef.parse(source)
    if revision is None:
        return ref
    if ref.revision is not None:
        raise InputError(
            "The revision is given twice.",
            cause=f"{ref.revision!r} and {revision!r}",
            fix=f"write {ref.repo}@{revision}",
        )
    return replace(ref, revision=revision)


def preservation_of(store: Store, manifest: PackManifest) -> Preservation:
    """Return whether the KP bank that a version was trained over is in the store, as any version."""
    trained_over = (manifest.lineage.get("preservation") or {}).get("digest")
    if trained_over is None:
        return "unknown"
    stored = {store.manifest(GENERAL, version).digest for version in store.versions(GENERAL)}
    return "same" if trained_over in stored else "other"


def _check_role(manifest: PackManifest) -> None:
    """Raise if a KP bank would be stored under another name than `general`, or another domain as `general`."""
    if (manifest.role == "preservation") != (manifest.name == GENERAL):
        is_bank = manifest.role == "preservation"
        raise InputError(
            f"This pack cannot be stored as the domain {manifest.name!r}.",
            cause="it is a KP bank" if is_bank else f"{GENERAL!r} is reserved for KP banks, and this is not one",
            fix="leave out --as" if is_bank else "choose another name: --as NAME",
        )


def _check_file_list(manifest: PackManifest, snapshot: Snapshot) -> None:
    """Compare the repository's files with the manifest, before anything large is fetched."""
    if snapshot.files is None:
        return
    for file in manifest.files:
        problem = _mismatch(file, snapshot.files.get(file.path))
        if problem:
            raise IntegrityError(
                f"{snapshot.repo} at {snapshot.commit[:12]} does not match its manifest.",
                cause=f"{file.path} {problem}",
                fix=f"report it to the publisher, or pull an earlier version: registry pull {snapshot.repo}@v1",
            )


def _mismatch(file: PackFile, remote: RemoteFile | None) -> str | None:
    if remote is None:
        return "is missing"
    if remote.size != file.size:
        return f"has {remote.size} bytes on the Hub, {file.size} in the manifest"
    if remote.sha256 not in (None, file.sha256):
        return f"is {remote.sha256} on the Hub, {file.sha256} in the manifest"
    return None


def _check_not_rewritten(
    manifest: PackManifest, ref: RemoteRef, snapshot: Snapshot, known: list[StoredVersion]
) -> None:
    """Raise if a tag moved or a version changed since it was pulled, unless the user names the commit."""
    if ref.is_commit:
        return
    if ref.version is not None and ref.version != manifest.version:
        raise IntegrityError(
            f"The tag {ref.revision} of {ref.repo} was moved.",
            cause=f"it points at commit {snapshot.commit[:12]}, which contains version {manifest.version}",
            fix=f"report it to the publisher; to pull it anyway: registry pull {ref.repo}@{snapshot.commit}",
        )
    for origin in (stored.origin for stored in known):
        if origin.version == manifest.version and origin.digest != manifest.digest:
            raise IntegrityError(
                f"Version {manifest.version} of {ref.repo} was changed after it was published.",
                cause=f"on {origin.time[:10]} its digest was {origin.digest}, at commit {origin.commit[:12]};"
                f" now it is {manifest.digest}, at commit {snapshot.commit[:12]}",
                fix=f"report it to the publisher; to pull it anyway: registry pull {ref.repo}@{snapshot.commit}",
            )


def _check_name(store: Store, manifest: PackManifest, known: list[StoredVersion], *, repo: str) -> None:
    """Raise if the name belongs to a domain from elsewhere; KP banks of any origin are versions of `general`."""
    name = manifest.name
    is_known = any(stored.manifest.name == name for stored in known)
    if store.versions(name) and not is_known and manifest.role != "preservation":
        raise ConflictError(
            f"A domain named {name!r} exists that was not pulled from {repo}.",
            cause=f"its versions: {', '.join(map(str, store.versions(name)))}",
            fix=f"pull it under another name: registry pull {repo} --as {name}-2",
        )


def _check_and_adopt(store: Store, manifest: PackManifest, known: list[StoredVersion]) -> PackManifest:
    from ..pack.check_pack import check_pack  # imports torch

    check_pack(store, manifest)
    return store.adopt(manifest, alias=LATEST if _is_newest(store, manifest, known) else None)


def _is_newest(store: Store, manifest: PackManifest, known: list[StoredVersion]) -> bool:
    """Return whether `latest` may move: to a first version, or from an older version of the same repository."""
    if not store.versions(manifest.name):
        return True
    latest = store.manifest(manifest.name).version
    remote_versions = {
        stored.manifest.version: stored.origin.version for stored in known if stored.manifest.name == manifest.name
    }
    is_older = latest in remote_versions and remote_versions[latest] < manifest.version
    return is_older and manifest.role != "preservation"


def _fetch_missing(
    store: Store, snapshot: Snapshot, manifest: PackManifest, hub: Hub, on_progress: OnProgress
) -> Iterable[PackFile]:
    """Fetch the files that the store lacks; yield each after it is stored as a verified blob."""
    missing = [file for file in manifest.files if not store.blobs.holds(file.sha256, size=file.size)]
    done, total = 0, sum(file.size for file in missing)
    for file in missing:
        data = hub.fetch(snapshot, file.path, is_valid=lambda data, file=file: _matches(data, file))
        store.blobs.put(data)
        done += file.size
        on_progress(Progress(f"pulling {manifest.name}", done, total))
        yield file


def _fetch_signature(snapshot: Snapshot, hub: Hub) -> bytes:
    remote = None if snapshot.files is None else snapshot.files.get(SIGNATURE_FILE)
    if snapshot.files is not None and (remote is None or not 0 < remote.size <= MAX_SIGNATURE):
        raise IntegrityError(
            f"{snapshot.repo} at {snapshot.commit[:12]} is not signed.",
            cause=f"it has no {SIGNATURE_FILE}" if remote is None else f"its {SIGNATURE_FILE} has {remote.size} bytes",
            fix="ask the publisher to sign it: registry push NAME --sign KEY",
        )
    return hub.fetch(
        snapshot, SIGNATURE_FILE, is_valid=lambda data: bool(data) and (remote is None or remote.matches(data))
    )


def _matches(data: bytes, file: PackFile) -> bool:
    return len(data) == file.size and sha256_of(data) == file.sha256
