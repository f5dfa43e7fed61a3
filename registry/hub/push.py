"""Push one version of a domain to a repository on the Hub, in one commit with a tag, or change nothing.

Before each attempt the head, tags and manifest on the Hub are read, and they decide what is left to do. So a repeated
push changes nothing, a lost response does no harm, and of two concurrent pushes one fails with an error.
"""

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
from .client import MAX_ATTEMPTS, Hub, RemoteFile, Snapshot, UncertainCommitError, git_oid
from .errors import is_missing_repo
from .origins import Origin, record_origin

CARD_FILE: Final = "README.md"
REPO_PREFIX: Final = "lorary-"
MAX_PULL_REQUESTS: Final = 20  # newest ones that are searched for the same pack
MAX_STEPS: Final = 10  # maximum number of times the Hub is read

State = Literal["pushed", "proposed", "there", "planned"]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of a push."""

    private: bool = False  # make a new repository private
    create_pr: bool = False  # open a pull request instead of committing to main
    dry_run: bool = False  # change nothing
    message: str | None = None  # commit message
    sign: Path | None = None  # private key; see registry/pack/signing.py


@dataclass(frozen=True, kw_only=True)
class Upload:
    """File of a push."""

    path: str
    size: int  # bytes
    is_new: bool  # whether the Hub has other bytes or none at this path


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """Result of a push, or of a dry run."""

    state: State  # pushed; proposed as a pull request; there already; planned by a dry run
    manifest: PackManifest
    repo: str
    endpoint: str
    tag: str
    commit: str | None  # None in a dry run
    pull_request: str | None  # URL
    makes_repo: bool
    files: tuple[Upload, ...]
    removed: tuple[str, ...]  # files of the previous version that this one does not have
    card: str


@dataclass(frozen=True)
class _Remote:
    """State of the repository on the Hub."""

    snapshot: Snapshot
    tags: dict[str, str]
    head: PackManifest | None  # manifest at the head of main


def push(
    store: Store,
    manifest: PackManifest,
    destination: str | None,
    options: PushOptions,
    *,
    hub: Hub,
) -> PushResult:
    """Push a stored version to the Hub.

    Args:
        store: Store of the version.
        manifest: Manifest of the version.
        destination: owner/repo, an owner, or None for the user's own lorary-NAME.
        options: Options of the push.
        hub: Connection to the Hub.

    Raises:
        ConflictError: The repository has another pack or a newer version, or other pushes keep coming first.
        RemoteError: The Hub rejects a request or fails.
        IntegrityError: A file of the version is damaged.
    """
    hub.require_token()
    store.verify(manifest)
    job = _PushJob(store, manifest, destination_repo(destination, manifest.name, hub), options, hub)
    failed = 0
    for _ in range(MAX_STEPS):
        try:
            done = job.step()
        except UncertainCommitError as uncertain:
            failed += 1
            if failed == MAX_ATTEMPTS:
                raise uncertain.error from uncertain
            hub.sleep(uncertain.delay_s, failed)
            continue
        if done is not None:
            return done
    raise RemoteError(f"{job.repo} keeps changing.", cause=f"it was read {MAX_STEPS} times", fix="push again")


def destination_repo(destination: str | None, name: str, hub: Hub) -> str:
    """Return owner/repo for a destination.

    Raises:
        InputError: The destination is not valid.
    """
    if destination is None:
        destination = hub.username()
    ref = RemoteRef.parse(destination if "/" in destination else f"{destination}/{REPO_PREFIX}{name}")
    if ref.revision is not None:
        raise InputError(f"{destination!r} has a revision.", fix=f"write {ref.repo}: push creates the tag")
    return ref.repo


class _PushJob:
    """State machine of one push: each step reads the Hub and does the next thing that is missing."""

    def __init__(self, store: Store, manifest: PackManifest, repo: str, options: PushOptions, hub: Hub):
        self.store, self.manifest, self.repo, self.options, self.hub = store, manifest, repo, options, hub
        self.generated = {MANIFEST_FILE: manifest.to_json(), CARD_FILE: model_card(manifest, repo=repo).encode()}
        if options.sign:
            self.generated[SIGNATURE_FILE] = sign_pack(store, manifest, options.sign)
        self.makes_repo = False
        self.has_committed = False  # a commit was attempted, so that the pack on the Hub may be this push's

    def step(self) -> PushResult | None:
        """Read the Hub and do the next step; return the result after the last one.

        Raises:
            UncertainCommitError: The commit may have failed.
        """
        remote = self._read_remote()
        if remote is None:
            return self._create_repo()
        found = self._find_pack(remote)
        if found is not None:
            return self._finish(remote, found)
        if self.options.create_pr and (proposed := self._find_pull_request()):
            url, commit = proposed
            return self._result("there", remote, commit=commit, pull_request=url)
        if self.options.dry_run:
            return self._result("planned", remote)
        self.has_committed = True
        commit, url = self.hub.create_commit(
            self.repo,
            self._operations(remote),
            commit_message=self.options.message or f"{self.manifest.name}, version {self.manifest.version}",
            parent_commit=remote.snapshot.commit,
            create_pr=self.options.create_pr,
        )
        if self.options.create_pr:
            return self._result("proposed", remote, commit=commit, pull_request=url)
        return self._tag(remote, commit, self.manifest.version)

    def _read_remote(self) -> _Remote | None:
        """Return the state of the repository; None if it does not exist."""
        try:
            snapshot = self.hub.snapshot(RemoteRef(self.repo, "main"))
        except RemoteError as error:
            if is_missing_repo(error):
                return None
            raise
        if self.options.private and not snapshot.is_private:
            raise ConflictError(
                f"{self.repo} is public.",
                cause="--private applies to new repositories; this one exists",
                fix=f"make it private at {self.hub.endpoint}/{self.repo}/settings, or leave out --private",
            )
        has_pack = MANIFEST_FILE in (snapshot.files or {})
        return _Remote(snapshot, self.hub.tags(self.repo), self.hub.manifest(snapshot) if has_pack else None)

    def _create_repo(self) -> PushResult | None:
        if self.options.create_pr:
            raise RemoteError(
                f"{self.repo} does not exist, so no pull request can be opened.",
                cause=f"it is not on {self.hub.endpoint}, or you have no access to it",
                fix="leave out --create-pr to create it",
            )
        self.makes_repo = True
        if self.options.dry_run:
            return self._result("planned", None)
        self.hub.create_repo(self.repo, private=self.options.private)
        return None

    def _find_pack(self, remote: _Remote) -> tuple[str, int] | None:
        """Return commit and version of the same pack on the Hub; None if it is not there and can be pushed.

        Raises:
            ConflictError: The repository contains something that a push must not replace.
        """
        ours, head = self.manifest, remote.head
        if head is not None and head.name != ours.name:
            raise self._conflict(
                f"contains the domain {head.name!r}",
                fix=f"push to another repository: registry push {ours.name} OWNER/REPO",
            )
        if head is not None and head.digest == ours.digest:
            return remote.snapshot.commit, head.version
        if tagged := remote.tags.get(f"v{ours.version}"):
            snapshot = self.hub.snapshot(RemoteRef(self.repo, tagged))
            if self.hub.manifest(snapshot).digest == ours.digest:
                return tagged, ours.version
            raise self._conflict(
                f"has another version {ours.version}", fix=f"pull it, and retrain from it: registry pull {self.repo}"
            )
        if head is not None and head.version >= ours.version:
            raise self._conflict(
                f"has version {head.version} already", fix=f"pull it, and retrain from it: registry pull {self.repo}"
            )
        clash = sorted({file.path for file in ours.files} & (remote.snapshot.files or {}).keys())
        if head is None and clash:
            raise self._conflict(
                f"contains other files, such as {clash[0]}", fix=f"registry push {ours.name} OWNER/REPO"
            )
        return None

    def _find_pull_request(self) -> tuple[str, str] | None:
        """Return URL and head commit of a recent pull request with the same pack."""
        pulls = sorted(self.hub.pull_requests(self.repo).items(), key=lambda pull: _pr_number(pull[0]), reverse=True)
        for ref, commit in pulls[:MAX_PULL_REQUESTS]:
            snapshot = self.hub.snapshot(RemoteRef(self.repo, commit))
            if MANIFEST_FILE in (snapshot.files or {}) and self.hub.manifest(snapshot).digest == self.manifest.digest:
                return f"{self.hub.endpoint}/{self.repo}/discussions/{_pr_number(ref)}", commit
        return None

    def _conflict(self, problem: str, *, fix: str) -> ConflictError:
        label = f"{self.manifest.name}@{self.manifest.version}"
        return ConflictError(f"{label} cannot be pushed to {self.repo}.", cause=f"the repository {problem}", fix=fix)

    def _finish(self, remote: _Remote, found: tuple[str, int]) -> PushResult:
        """Add the tag if it is missing; the pack itself is on the Hub."""
        commit, version = found
        if self.options.sign and not self.has_committed:
            self._check_is_signed(commit, version)
        if self.options.dry_run or self.options.create_pr:
            return self._result("there", remote, commit=commit, version=version)
        return self._tag(remote, commit, version)

    def _check_is_signed(self, commit: str, version: int) -> None:
        if SIGNATURE_FILE not in (self.hub.snapshot(RemoteRef(self.repo, commit)).files or {}):
            raise self._conflict(
                f"has version {version} without a signature, and versions are immutable",
                fix=f"sign the next version: registry retrain {self.manifest.name}, then push it with --sign",
            )

    def _tag(self, remote: _Remote, commit: str, version: int) -> PushResult:
        if f"v{version}" not in remote.tags:
            self.hub.create_tag(self.repo, f"v{version}", commit)
        origin = Origin(
            endpoint=self.hub.endpoint,
            repo=self.repo,
            commit=commit,
            name=self.manifest.name,
            version=version,
            digest=self.manifest.digest,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        record_origin(self.store, self.manifest, origin)
        return self._result("pushed" if self.has_committed else "there", remote, commit=commit, version=version)

    def _operations(self, remote: _Remote) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stored = {file.path: str(self.store.blobs.path(file.sha256)) for file in self.manifest.files}
        added = [CommitOperationAdd(path, content) for path, content in {**self.generated, **stored}.items()]
        return added + [CommitOperationDelete(path) for path in self._removed(remote)]

    def _removed(self, remote: _Remote | None) -> tuple[str, ...]:
        if remote is None or remote.head is None:
            return ()
        kept = {file.path for file in self.manifest.files} | self.generated.keys()
        theirs = (
            *(file.path for file in remote.head.files),
            SIGNATURE_FILE,
        )  # a signature is valid for one version only
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
        remote_files = (remote.snapshot.files if remote else None) or {}
        uploads = [
            Upload(path=path, size=len(data), is_new=path not in remote_files or not remote_files[path].matches(data))
            for path, data in self.generated.items()
        ]
        uploads += [
            Upload(path=file.path, size=file.size, is_new=not self._is_uploaded(file, remote_files.get(file.path)))
            for file in self.manifest.files
        ]
        return PushResult(
            state=state,
            manifest=self.manifest,
            repo=self.repo,
            endpoint=self.hub.endpoint,
            tag=f"v{version or self.manifest.version}",
            commit=commit,
            pull_request=pull_request,
            makes_repo=self.makes_repo,
            files=tuple(uploads),
            removed=self._removed(remote),
            card=self.generated[CARD_FILE].decode(),
        )

    def _is_uploaded(self, file: PackFile, remote: RemoteFile | None) -> bool:
        if remote is None or remote.size != file.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == file.sha256
        return remote.oid == git_oid(self.store.blobs.get(file.sha256))


def _pr_number(ref: str) -> int:
    """Return the number of a pull request reference such as refs/pr/3."""
    return int(ref.rpartition("/")[2])
