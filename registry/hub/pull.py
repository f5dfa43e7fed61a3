"""`pull`: one version of a pack from the Hub into the store, proved sound, or nothing.

The revision is resolved once; everything is read at that commit. Each file is checked against the manifest and becomes
a blob, so an interrupted pull goes on where it was. The version exists only when all of them are there and the strict
reader has found nothing in them that this program would not have written.
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
from .origins import Origin, Traced, note_origin, traced_to

Preservation = Literal["same", "other", "unknown"]


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """What a pull brought."""

    manifest: PackManifest  # as it is stored here
    origin: Origin
    is_new: bool  # whether a version was stored
    is_latest: bool  # whether the alias `latest` means it
    fetched: tuple[PackFile, ...]  # files that were not in the store
    preservation: Preservation  # whether the KP bank that it was trained over is here
    is_checked: bool  # whether the Hub was asked; offline only its cache is
    is_signed: bool = False  # whether a signature was asked for, and is valid


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
    """Bring a version into the store; what is there already is neither fetched nor stored again.

    Args:
        store: The store.
        base: The base model it was made for.
        ref: Which pack.
        hub: The Hub.
        name: The domain that it becomes, if not of its own name.
        signer: The public key of whoever must have signed it.
        on_progress: Told of bytes.

    Raises:
        RemoteError: The pack cannot be had.
        IncompatibleError: It belongs to another base model.
        IntegrityError: A file differs from the manifest, the pack is unsound, a version is not what it was, or the
            signature that is required is missing or not valid.
        ConflictError: There is a domain of this name that did not come from there.
        InputError: A KP bank may only become `general`, and nothing else may.
    """
    snapshot = hub.snapshot(ref)
    theirs = hub.manifest(snapshot, revision=ref.revision or "main")
    check_manifest(theirs)
    ours = replace(theirs, name=check_name(name)) if name else theirs
    check_same_base(wanted=theirs.base, found=base, what=f"{ref.repo}, version {theirs.version},")
    if theirs.version < 1:
        raise IntegrityError(
            f"{ref.repo} holds a draft.", cause="the manifest says version 0", fix="tell who pushed it"
        )
    _check_role(ours)
    _check_listed(theirs, snapshot)
    traces = traced_to(store, endpoint=hub.endpoint, repo=ref.repo)
    _check_unmoved(theirs, ref, snapshot, traces)
    stored = store.find_same(ours)
    if stored is None:
        _check_name_is_free(store, ours, traces, repo=ref.repo)
    signature = _fetch_signature(snapshot, hub) if signer else b""
    fetched = tuple(_fetch_missing(store, snapshot, theirs, hub, on_progress))
    if signer:
        check_signature(store, theirs, signature, signer)
    manifest = stored or _prove_and_adopt(store, ours, traces)
    origin = Origin(
        endpoint=hub.endpoint,
        repo=ref.repo,
        commit=snapshot.commit,
        name=theirs.name,
        version=theirs.version,
        digest=theirs.digest,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    note_origin(store, manifest, origin)
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
    """The pack that a person names; the revision may stand in either place.

    Raises:
        InputError: It breaks the grammar, or has two revisions.
    """
    ref = RemoteRef.parse(source)
    if revision is None:
        return ref
    if ref.revision is not None:
        raise InputError(
            "There are two revisions.", cause=f"{ref.revision!r} and {revision!r}", fix=f"write {ref.repo}@{revision}"
        )
    return replace(ref, revision=revision)


def preservation_of(store: Store, manifest: PackManifest) -> Preservation:
    """Whether the KP bank over which a version was trained is in the store, in any version."""
    trained_over = (manifest.lineage.get("preservation") or {}).get("digest")
    if trained_over is None:
        return "unknown"
    here = {store.manifest(GENERAL, version).digest for version in store.versions(GENERAL)}
    return "same" if trained_over in here else "other"


def _check_role(manifest: PackManifest) -> None:
    """The KP slot is for KP banks, and they for it."""
    if (manifest.role == "preservation") != (manifest.name == GENERAL):
        is_bank = manifest.role == "preservation"
        raise InputError(
            f"This pack cannot become the domain {manifest.name!r}.",
            cause="it is a KP bank" if is_bank else f"{GENERAL!r} is the KP slot, and this is no KP bank",
            fix="leave out --as" if is_bank else "choose another name: --as NAME",
        )


def _check_listed(manifest: PackManifest, snapshot: Snapshot) -> None:
    """Refuses a repository that does not have what its manifest names, before anything large is fetched."""
    if snapshot.files is None:
        return
    for file in manifest.files:
        problem = _problem(file, snapshot.files.get(file.path))
        if problem:
            raise IntegrityError(
                f"{snapshot.repo} at {snapshot.commit[:12]} is not what its manifest says.",
                cause=f"{file.path} {problem}",
                fix=f"tell who pushed it, or pull an earlier version: registry pull {snapshot.repo}@v1",
            )


def _problem(file: PackFile, there: RemoteFile | None) -> str | None:
    if there is None:
        return "is missing"
    if there.size != file.size:
        return f"has {there.size} bytes there, {file.size} in the manifest"
    if there.sha256 not in (None, file.sha256):
        return f"is {there.sha256} there, {file.sha256} in the manifest"
    return None


def _check_unmoved(manifest: PackManifest, ref: RemoteRef, snapshot: Snapshot, traces: list[Traced]) -> None:
    """A version is what it was when it was pulled; only who names a commit gets what is there now."""
    if ref.is_commit:
        return
    if ref.version is not None and ref.version != manifest.version:
        raise IntegrityError(
            f"The tag {ref.revision} of {ref.repo} was put elsewhere.",
            cause=f"it is at commit {snapshot.commit[:12]}, which holds version {manifest.version}",
            fix=f"tell who pushed it; to have it all the same: registry pull {ref.repo}@{snapshot.commit}",
        )
    for traced in traces:
        origin = traced.origin
        if origin.version == manifest.version and origin.digest != manifest.digest:
            raise IntegrityError(
                f"Version {manifest.version} of {ref.repo} is not what it was.",
                cause=f"on {origin.time[:10]} its digest was {origin.digest}, at commit {origin.commit[:12]};"
                f" now it is {manifest.digest}, at commit {snapshot.commit[:12]}",
                fix=f"tell who pushed it; to have it all the same: registry pull {ref.repo}@{snapshot.commit}",
            )


def _check_name_is_free(store: Store, manifest: PackManifest, traces: list[Traced], *, repo: str) -> None:
    """A domain takes up what comes from where it came from before; a KP bank is never mixed up with another."""
    name = manifest.name
    is_known = any(traced.manifest.name == name for traced in traces)
    if store.versions(name) and not is_known and manifest.role != "preservation":
        raise ConflictError(
            f"There is a domain named {name!r} that did not come from {repo}.",
            cause=f"its versions: {', '.join(map(str, store.versions(name)))}",
            fix=f"pull it under another name: registry pull {repo} --as {name}-2",
        )


def _prove_and_adopt(store: Store, manifest: PackManifest, traces: list[Traced]) -> PackManifest:
    from ..pack.check_pack import check_pack  # imports torch

    check_pack(store, manifest)
    return store.adopt(manifest, alias=LATEST if _is_newest(store, manifest, traces) else None)


def _is_newest(store: Store, manifest: PackManifest, traces: list[Traced]) -> bool:
    """Whether `latest` may move: to a first version, or from an older version of the same repository."""
    if not store.versions(manifest.name):
        return True
    latest = store.manifest(manifest.name).version
    known = {
        traced.manifest.version: traced.origin.version for traced in traces if traced.manifest.name == manifest.name
    }
    return latest in known and known[latest] < manifest.version and manifest.role != "preservation"


def _fetch_missing(
    store: Store, snapshot: Snapshot, manifest: PackManifest, hub: Hub, on_progress: OnProgress
) -> Iterable[PackFile]:
    """Files that the store lacks, each a verified blob when it is yielded."""
    missing = [file for file in manifest.files if not store.blobs.holds(file.sha256, size=file.size)]
    done, total = 0, sum(file.size for file in missing)
    for file in missing:
        data = hub.fetch(snapshot, file.path, is_whole=lambda data, file=file: _is_whole(data, file))
        store.blobs.put(data)
        done += file.size
        on_progress(Progress(f"pulling {manifest.name}", done, total))
        yield file


def _fetch_signature(snapshot: Snapshot, hub: Hub) -> bytes:
    there = None if snapshot.files is None else snapshot.files.get(SIGNATURE_FILE)
    if snapshot.files is not None and (there is None or not 0 < there.size <= MAX_SIGNATURE):
        raise IntegrityError(
            f"{snapshot.repo} at {snapshot.commit[:12]} is not signed.",
            cause=f"it has no {SIGNATURE_FILE}" if there is None else f"its {SIGNATURE_FILE} has {there.size} bytes",
            fix="ask who pushed it to sign it: registry push NAME --sign KEY",
        )
    return hub.fetch(snapshot, SIGNATURE_FILE, is_whole=lambda data: bool(data) and (there is None or there.fits(data)))


def _is_whole(data: bytes, file: PackFile) -> bool:
    return len(data) == file.size and sha256_of(data) == file.sha256
