"""`push`: one version of a domain to a repository of the Hub, in one commit, with a tag; or nothing.

What the Hub has decides, never what we believe to have sent: before each try its head, its tags and its manifest are
read. So a repeated push changes nothing, a lost answer does no harm, and of two who push at once one is told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from ...domains.errors import ConflictError, InputError, RemoteError
from ...domains.remote_ref import RemoteRef
from ..pack.signing import SIGNATURE_FILE, sign_pack
from ..store.manifest import MANIFEST_FILE, PackFile, PackManifest
from ..store.store import Store
from .card import model_card
from .client import TRIES, Hub, RemoteFile, Snapshot, UnsureError, git_oid
from .errors import is_missing_repo
from .origins import Origin, note_origin

CARD_FILE: Final = "README.md"
REPO_PREFIX: Final = "lorary-"
PULL_REQUESTS: Final = 20  # the newest that are looked at for the same pack
STEPS: Final = 10  # at most so many looks at the Hub

State = Literal["pushed", "proposed", "there", "planned"]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How a version is to be pushed."""

    private: bool = False  # a repository that is made is private
    create_pr: bool = False  # a pull request is opened instead
    dry_run: bool = False  # everything is only looked at
    message: str | None = None  # of the commit
    sign: Path | None = None  # private key; see signing.py


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One file of a push."""

    path: str
    size: int  # bytes
    is_new: bool  # whether the Hub has no such bytes at this path


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What a push did, or would do."""

    state: State  # pushed; proposed as a pull request; there already; or only planned
    manifest: PackManifest
    repo: str
    endpoint: str
    tag: str
    commit: str | None  # None of a plan
    pull_request: str | None  # its address
    makes_repo: bool
    files: tuple[Upload, ...]
    removed: tuple[str, ...]  # files of the pack before that this one has not
    card: str


@dataclass(frozen=True)
class _Remote:
    """What the Hub has."""

    snapshot: Snapshot
    tags: dict[str, str]
    head: PackManifest | None  # the pack at the head of main


def push(
    store: Store,
    manifest: PackManifest,
    destination: str | None,
    wishes: PushOptions,
    *,
    hub: Hub,
) -> PushResult:
    """Bring a stored version to the Hub.

    Args:
        store: The store.
        manifest: Of the version.
        destination: owner/repo, an owner, or None: the user's own lorary-NAME.
        wishes: How.
        hub: The Hub.

    Raises:
        ConflictError: The repository has another pack or a newer version, or somebody else keeps pushing.
        RemoteError: The Hub refuses or fails.
        IntegrityError: A file of the version is damaged.
    """
    hub.check_token()
    store.verify(manifest)
    job = _Job(store, manifest, destination_repo(destination, manifest.name, hub), wishes, hub)
    failed = 0
    for _ in range(STEPS):
        try:
            done = job.step()
        except UnsureError as unsure:
            failed += 1
            if failed == TRIES:
                raise unsure.ours from unsure
            hub.rest(unsure.wait_s, failed)
            continue
        if done is not None:
            return done
    raise RemoteError(f"{job.repo} does not settle.", cause=f"it was looked at {STEPS} times", fix="push again")


def destination_repo(destination: str | None, name: str, hub: Hub) -> str:
    """The repository that a destination means.

    Raises:
        InputError: It means none.
    """
    if destination is None:
        destination = hub.user()
    ref = RemoteRef.parse(destination if "/" in destination else f"{destination}/{REPO_PREFIX}{name}")
    if ref.revision is not None:
        raise InputError(f"{destination!r} names a revision.", fix=f"write {ref.repo}: push makes a tag of its own")
    return ref.repo


class _Job:
    """One push; it looks at the Hub and does the next thing until nothing is left to do."""

    def __init__(self, store: Store, manifest: PackManifest, repo: str, wishes: PushOptions, hub: Hub):
        self.store, self.manifest, self.repo, self.wishes, self.hub = store, manifest, repo, wishes, hub
        self.own = {MANIFEST_FILE: manifest.to_json(), CARD_FILE: model_card(manifest, repo=repo).encode()}
        if wishes.sign:
            self.own[SIGNATURE_FILE] = sign_pack(store, manifest, wishes.sign)
        self.makes_repo = False
        self.has_tried = False  # whether what is there may be ours

    def step(self) -> PushResult | None:
        """Do one thing; return what was done when nothing is left.

        Raises:
            UnsureError: What was tried may have failed.
        """
        remote = self._look()
        if remote is None:
            return self._make_repo()
        found = self._find(remote)
        if found is not None:
            return self._finish(remote, found)
        if self.wishes.create_pr and (same := self._same_pull_request()):
            address, commit = same
            return self._result("there", remote, commit=commit, pull_request=address)
        if self.wishes.dry_run:
            return self._result("planned", remote)
        self.has_tried = True
        commit, address = self.hub.commit(
            self.repo,
            self._operations(remote),
            commit_message=self.wishes.message or f"{self.manifest.name}, version {self.manifest.version}",
            parent_commit=remote.snapshot.commit,
            create_pr=self.wishes.create_pr,
        )
        if self.wishes.create_pr:
            return self._result("proposed", remote, commit=commit, pull_request=address)
        return self._tag(remote, commit, self.manifest.version)

    def _look(self) -> _Remote | None:
        """What the Hub has; None where there is no such repository."""
        try:
            snapshot = self.hub.snapshot(RemoteRef(self.repo, "main"))
        except RemoteError as error:
            if is_missing_repo(error):
                return None
            raise
        if self.wishes.private and not snapshot.is_private:
            raise ConflictError(
                f"{self.repo} is public.",
                cause="--private is for a repository that is made; this one is there",
                fix=f"make it private at {self.hub.endpoint}/{self.repo}/settings, or leave out --private",
            )
        has_pack = MANIFEST_FILE in (snapshot.files or {})
        return _Remote(snapshot, self.hub.tags(self.repo), self.hub.manifest(snapshot) if has_pack else None)

    def _make_repo(self) -> PushResult | None:
        if self.wishes.create_pr:
            raise RemoteError(
                f"There is no {self.repo} to open a pull request for.",
                cause=f"{self.hub.endpoint} does not know it, or does not show it to you",
                fix="leave out --create-pr to make it",
            )
        self.makes_repo = True
        if self.wishes.dry_run:
            return self._result("planned", None)
        self.hub.create_repo(self.repo, private=self.wishes.private)
        return None

    def _find(self, remote: _Remote) -> tuple[str, int] | None:
        """The commit and the number of the same pack on the Hub; None where it may be pushed.

        Raises:
            ConflictError: Something else is in its place.
        """
        ours, head = self.manifest, remote.head
        if head is not None and head.name != ours.name:
            raise self._conflict(
                f"holds the domain {head.name!r}", fix=f"push to another one: registry push {ours.name} OWNER/REPO"
            )
        if head is not None and head.digest == ours.digest:
            return remote.snapshot.commit, head.version
        if tagged := remote.tags.get(f"v{ours.version}"):
            snapshot = self.hub.snapshot(RemoteRef(self.repo, tagged))
            if self.hub.manifest(snapshot).digest == ours.digest:
                return tagged, ours.version
            raise self._conflict(
                f"has another version {ours.version}", fix=f"registry pull {self.repo}, and build on that"
            )
        if head is not None and head.version >= ours.version:
            raise self._conflict(
                f"has version {head.version} already", fix=f"registry pull {self.repo}, and build on that"
            )
        clash = sorted({file.path for file in ours.files} & (remote.snapshot.files or {}).keys())
        if head is None and clash:
            raise self._conflict(f"holds other files, such as {clash[0]}", fix=f"registry push {ours.name} OWNER/REPO")
        return None

    def _same_pull_request(self) -> tuple[str, str] | None:
        """The address and the commit of a pull request with this pack, if one of the newest has it."""
        pulls = sorted(self.hub.pull_requests(self.repo).items(), key=lambda pull: _number_of(pull[0]), reverse=True)
        for ref, commit in pulls[:PULL_REQUESTS]:
            snapshot = self.hub.snapshot(RemoteRef(self.repo, commit))
            if MANIFEST_FILE in (snapshot.files or {}) and self.hub.manifest(snapshot).digest == self.manifest.digest:
                return f"{self.hub.endpoint}/{self.repo}/discussions/{_number_of(ref)}", commit
        return None

    def _conflict(self, what: str, *, fix: str) -> ConflictError:
        label = f"{self.manifest.name}@{self.manifest.version}"
        return ConflictError(f"{label} cannot be pushed to {self.repo}.", cause=f"the repository {what}", fix=fix)

    def _finish(self, remote: _Remote, found: tuple[str, int]) -> PushResult:
        """The pack is there: only a tag may be missing."""
        commit, version = found
        if self.wishes.sign and not self.has_tried:
            self._check_is_signed(commit, version)
        if self.wishes.dry_run or self.wishes.create_pr:
            return self._result("there", remote, commit=commit, version=version)
        return self._tag(remote, commit, version)

    def _check_is_signed(self, commit: str, version: int) -> None:
        if SIGNATURE_FILE not in (self.hub.snapshot(RemoteRef(self.repo, commit)).files or {}):
            raise self._conflict(
                f"has version {version} without a signature, and a version never changes",
                fix=f"sign the next version: registry retrain {self.manifest.name}, then push it with --sign",
            )

    def _tag(self, remote: _Remote, commit: str, version: int) -> PushResult:
        if f"v{version}" not in remote.tags:
            self.hub.tag(self.repo, f"v{version}", commit)
        origin = Origin(
            endpoint=self.hub.endpoint,
            repo=self.repo,
            commit=commit,
            name=self.manifest.name,
            version=version,
            digest=self.manifest.digest,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        note_origin(self.store, self.manifest, origin)
        return self._result("pushed" if self.has_tried else "there", remote, commit=commit, version=version)

    def _operations(self, remote: _Remote) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stored = {file.path: str(self.store.blobs.path(file.sha256)) for file in self.manifest.files}
        added = [CommitOperationAdd(path, content) for path, content in {**self.own, **stored}.items()]
        return added + [CommitOperationDelete(path) for path in self._removed(remote)]

    def _removed(self, remote: _Remote | None) -> tuple[str, ...]:
        if remote is None or remote.head is None:
            return ()
        kept = {file.path for file in self.manifest.files} | self.own.keys()
        theirs = (*(file.path for file in remote.head.files), SIGNATURE_FILE)  # a signature of another version is none
        return tuple(path for path in theirs if path not in kept and path in (remote.snapshot.files or {}))

    def _result(
        self,
        state: State,
        remote: _Remote | None,
        *,
        commit: str | None = None,
        version: int | None = None,
        pull_request: str | None = None,
    ) -> PushResult:
        there = (remote.snapshot.files if remote else None) or {}
        files = [_upload(path, len(data), there, is_same=_same_bytes(data)) for path, data in self.own.items()]
        files += [_upload(f.path, f.size, there, is_same=self._same_file(f)) for f in self.manifest.files]
        return PushResult(
            state=state,
            manifest=self.manifest,
            repo=self.repo,
            endpoint=self.hub.endpoint,
            tag=f"v{version or self.manifest.version}",
            commit=commit,
            pull_request=pull_request,
            makes_repo=self.makes_repo,
            files=tuple(files),
            removed=self._removed(remote),
            card=self.own[CARD_FILE].decode(),
        )

    def _same_file(self, file: PackFile) -> Callable[[RemoteFile], bool]:
        def is_same(there: RemoteFile) -> bool:
            if there.sha256 is not None:
                return there.sha256 == file.sha256
            return there.oid == git_oid(self.store.blobs.get(file.sha256))

        return is_same


def _upload(path: str, size: int, there: dict[str, RemoteFile], *, is_same: Callable[[RemoteFile], bool]) -> Upload:
    found = there.get(path)
    return Upload(path=path, size=size, is_new=found is None or found.size != size or not is_same(found))


def _same_bytes(data: bytes) -> Callable[[RemoteFile], bool]:
    return lambda there: there.oid == git_oid(data)


def _number_of(ref: str) -> int:
    """The number of a pull request's reference, refs/pr/3."""
    return int(ref.rpartition("/")[2])
