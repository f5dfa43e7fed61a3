"""Client of the Hugging Face Hub: huggingface_hub with timeouts, bounded retries, and errors of ours.

A pull reads everything at one commit. huggingface_hub by itself would fall back to an outdated branch when the Hub is
down, would not retry a failed file, and would sleep for as long as a Retry-After header asks.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ...domains.errors import IntegrityError, LoraryError, RemoteError
from ...domains.progress import OnProgress, Progress, silent
from ...domains.remote_ref import RemoteRef
from ..store.blobs import PREFIX, sha256_of
from ..store.manifest import MANIFEST_FILE, PackManifest
from ..store.strict_json import MAX_BYTES
from .errors import (
    LOGIN,
    MAX_RETRY_DELAY_S,
    RETRYABLE_STATUS,
    STALE_PARENT,
    client_errors,
    http_status,
    retry_after,
    retry_delay,
    to_lorary_error,
)

MAX_ATTEMPTS: Final = 4
RETRY_BUDGET_S: Final = 20.0  # no retry is started later than this; huggingface_hub has retries of its own inside
TIMEOUT_S: Final = 30.0  # without a byte from the Hub
LIBRARY: Final = "lorary"

Response = TypeVar("Response")


@dataclass(frozen=True)
class RemoteFile:
    """File metadata from the Hub."""

    size: int  # bytes
    sha256: str | None  # digest of an LFS file
    oid: str | None  # git blob id of any other file

    def matches(self, data: bytes) -> bool:
        """Return whether `data` has this size and digest."""
        has_size = len(data) == self.size
        return has_size and (self.sha256 in (None, sha256_of(data))) and (self.oid in (None, git_oid(data)))


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: str
    commit: str
    files: dict[str, RemoteFile] | None  # by path; None offline
    is_private: bool = False


class UncertainCommitError(Exception):
    """A commit failed, or succeeded and the response was lost; read the Hub again to find out."""

    def __init__(self, error: LoraryError, *, delay_s: float):
        self.error, self.delay_s = error, delay_s


class Hub:
    """Connection to the Hub at $HF_ENDPOINT with the user's token; offline, the local cache only."""

    def __init__(self, *, offline: bool = False, on_progress: OnProgress = silent):
        from huggingface_hub import HfApi, constants

        self.offline = offline or constants.HF_HUB_OFFLINE
        self.api = HfApi(library_name=LIBRARY)
        self.endpoint = self.api.endpoint
        self._on_progress = on_progress

    # --- reading ---

    def snapshot(self, ref: RemoteRef, *, marker: str = MANIFEST_FILE) -> Snapshot:
        """Resolve a reference to a commit and list the files of that commit.

        Args:
            marker: A file that the repository must have; offline, it is looked up in the cache to find the commit.

        Raises:
            RemoteError: The repository or revision does not exist, the Hub cannot be reached, or, offline, the file is
                not in the cache.
        """
        if self.offline:
            path = self._download(ref.repo, marker, ref.revision)
            return Snapshot(ref.repo, path.parents[marker.count("/")].name, None)
        info = self.call(ref.repo, lambda: self.api.model_info(ref.repo, revision=ref.revision, files_metadata=True))
        files = {sibling.rfilename: _remote_file(sibling) for sibling in info.siblings or []}
        return Snapshot(ref.repo, str(info.sha), files, is_private=bool(info.private))

    def manifest(self, snapshot: Snapshot, *, revision: str | None = None) -> PackManifest:
        """Fetch and parse the manifest of a snapshot.

        Args:
            revision: The revision that the user named, so that the cache remembers which commit it resolved to.

        Raises:
            RemoteError: The repository contains no pack.
            IntegrityError: The manifest cannot be parsed.
        """
        listed = snapshot.files or {}
        if snapshot.files is not None and MANIFEST_FILE not in listed:
            raise RemoteError(
                f"{snapshot.repo} is not a lorary pack.",
                cause=f"commit {snapshot.commit[:12]} has no {MANIFEST_FILE}",
                fix="find packs: registry search",
            )
        source = f"The manifest of {snapshot.repo} at {snapshot.commit[:12]}"
        remote = listed.get(MANIFEST_FILE)
        if remote is not None and remote.size > MAX_BYTES:
            raise IntegrityError(f"{source} is too large.", cause=f"{remote.size} bytes; the limit is {MAX_BYTES}")
        oid = remote.oid if remote else None
        data = self.fetch(
            snapshot,
            MANIFEST_FILE,
            is_valid=lambda data: len(data) <= MAX_BYTES and (oid is None or git_oid(data) == oid),
            revision=revision,
        )
        return PackManifest.from_json(data, source=source)

    def fetch(
        self, snapshot: Snapshot, path: str, *, is_valid: Callable[[bytes], bool], revision: str | None = None
    ) -> bytes:
        """Return the bytes of a file, from the cache or the Hub; download it once more if they are not valid.

        Raises:
            RemoteError: The file cannot be downloaded, or the revision moved during the download.
            IntegrityError: The bytes are still not valid.
        """
        for force in (False, True):
            name = snapshot.commit if force else revision
            data = self._download_at(snapshot, path, revision=name, force=force).read_bytes()
            if is_valid(data):
                return data
        raise IntegrityError(
            f"{path} of {snapshot.repo} at {snapshot.commit[:12]} is damaged.",
            cause=f"its {len(data)} bytes do not match the expected size or digest"
            + (", in the cache on this machine" if self.offline else ", after two downloads"),
            fix="repeat the command" + (" without --offline" if self.offline else ", or report it to the publisher"),
        )

    def tags(self, repo: str) -> dict[str, str]:
        """Return the commit of each tag."""
        refs = self.call(repo, lambda: self.api.list_repo_refs(repo))
        return {ref.name: ref.target_commit for ref in refs.tags}

    def pull_requests(self, repo: str) -> dict[str, str]:
        """Return the head commit of each pull request, by reference: `refs/pr/3`."""
        refs = self.call(repo, lambda: self.api.list_repo_refs(repo, include_pull_requests=True))
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}

    # --- writing ---

    def username(self) -> str:
        """Return the name of the user that the token belongs to."""
        return str(self.call("the Hub", self.api.whoami)["name"])

    def require_token(self) -> None:
        """Raise if there is no access token.

        Raises:
            RemoteError: There is none.
        """
        from huggingface_hub import get_token

        if get_token() is None:
            raise RemoteError("You are not logged in to the Hub.", cause="there is no access token", fix=LOGIN)

    def create_repo(self, repo: str, *, private: bool) -> None:
        """Create a repository if it does not exist."""
        self.call(repo, lambda: self.api.create_repo(repo, private=private or None, exist_ok=True))

    def create_commit(self, repo: str, operations: Sequence[Any], **options: Any) -> tuple[str, str | None]:
        """Commit all operations at once; return the commit, and the URL of the pull request if one was opened.

        Args:
            repo: owner/repo.
            operations: `CommitOperationAdd` and `CommitOperationDelete` of huggingface_hub.
            **options: commit_message, parent_commit, create_pr.

        Raises:
            UncertainCommitError: The commit may or may not have happened, or another one came first.
            RemoteError: The commit was rejected.
        """
        try:
            info = self._call_once(lambda: self.api.create_commit(repo, operations, **options))
        except client_errors() as error:
            ours = to_lorary_error(error, repo=repo, endpoint=self.endpoint)
            delay = 1.0 if http_status(error) == STALE_PARENT else retry_delay(error, attempt=1)
            if delay is None:
                raise ours from error
            raise UncertainCommitError(ours, delay_s=delay) from error
        return info.oid, info.pr_url

    def create_tag(self, repo: str, tag: str, commit: str) -> None:
        """Tag a commit unless the tag exists."""
        self.call(repo, lambda: self.api.create_tag(repo, tag=tag, revision=commit, exist_ok=True))

    # --- requests ---

    def call(self, repo: str, request: Callable[[], Response]) -> Response:
        """Run an idempotent request, retrying errors that may be temporary.

        Raises:
            RemoteError: The request failed.
        """
        start, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return self._call_once(request)
            except client_errors() as error:
                delay = retry_delay(error, attempt)
                if delay is None or attempt == MAX_ATTEMPTS or time.monotonic() + delay - start > RETRY_BUDGET_S:
                    raise to_lorary_error(error, repo=repo, endpoint=self.endpoint) from error
                self.sleep(delay, attempt)

    def sleep(self, seconds: float, attempt: int) -> None:
        """Report the wait and sleep before the next attempt."""
        self._on_progress(Progress(f"waiting for the Hub, attempt {attempt + 1} of {MAX_ATTEMPTS}", 0, 0))
        time.sleep(seconds)

    def _call_once(self, request: Callable[[], Response]) -> Response:
        with _bounded_session():
            return request()

    def _download_at(self, snapshot: Snapshot, path: str, *, revision: str | None = None, force: bool = False) -> Path:
        """Return the cached path of a file, checked to be at the snapshot's commit."""
        name = revision or snapshot.commit
        found = self._download(snapshot.repo, path, name, force=force and not self.offline)
        commit = found.parents[path.count("/")].name
        if commit != snapshot.commit:
            raise RemoteError(
                f"{snapshot.repo} changed during the download.",
                cause=f"{name} resolved to {snapshot.commit[:12]}, then to {commit[:12]}",
                fix="repeat the command",
            )
        return found

    def _download(self, repo: str, path: str, revision: str | None, *, force: bool = False) -> Path:
        """Return the path of a file in the client's cache, downloaded if needed and allowed."""
        return Path(
            self.call(
                repo,
                lambda: self.api.hf_hub_download(
                    repo, path, revision=revision, force_download=force, local_files_only=self.offline
                ),
            )
        )


def git_oid(data: bytes) -> str:
    """Return the git blob id of a file's bytes, which the Hub reports for files that are not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(sibling.size or 0, PREFIX + lfs.sha256 if lfs else None, None if lfs else sibling.blob_id)


@contextmanager
def _bounded_session() -> Iterator[None]:
    """Give the client's HTTP session a timeout, and a hook that refuses long Retry-After delays."""
    from huggingface_hub.utils import get_session

    session = get_session()
    timeout, hooks = session.timeout, session.event_hooks
    session.timeout = TIMEOUT_S
    session.event_hooks = {**hooks, "response": [*hooks.get("response", []), _refuse_long_delay]}
    try:
        yield
    finally:
        session.timeout, session.event_hooks = timeout, hooks


def _refuse_long_delay(response: Any) -> None:
    """Abort a request that the client would retry only after a long sleep.

    Raises:
        RemoteError: The server asks for a longer delay than MAX_RETRY_DELAY_S.
    """
    delay = retry_after(response.headers) if response.status_code in RETRYABLE_STATUS else None
    if delay is not None and delay > MAX_RETRY_DELAY_S:
        raise RemoteError(
            "The Hub accepts no more requests for now.",
            cause=f"it answered {response.status_code} and asks to wait {delay:.0f} s",
            fix=f"repeat the command in {delay:.0f} s; it resumes",
        )
