"""The Hub through huggingface_hub: every question bounded in time and tries, every failure one of our errors.

What a pull reads of a repository is read at one commit. The client alone would go on with an outdated branch when the
Hub is down, would not ask again when it fails on a file, and waits as long as it is told to.
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
    MAX_WAIT_S,
    STALE_PARENT,
    TRANSIENT,
    failures,
    status_of,
    to_lorary_error,
    wait_before_retry,
    wait_of,
)

TRIES: Final = 4
BUDGET_S: Final = 20.0  # no new try after so long; the client tries by itself, too
TIMEOUT_S: Final = 30.0  # without a byte from the Hub
LIBRARY: Final = "lorary"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file."""

    size: int  # bytes
    sha256: str | None  # digest, of LFS files
    oid: str | None  # git's digest, of the others

    def fits(self, data: bytes) -> bool:
        """Whether these are the bytes."""
        has_size = len(data) == self.size
        return has_size and (self.sha256 in (None, sha256_of(data))) and (self.oid in (None, git_oid(data)))


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: str
    commit: str
    files: dict[str, RemoteFile] | None  # None where the Hub was not asked
    is_private: bool = False


class UnsureError(Exception):
    """A commit failed, or only its answer was lost: what the Hub has now decides."""

    def __init__(self, ours: LoraryError, *, wait_s: float):
        self.ours, self.wait_s = ours, wait_s


class Hub:
    """A connection to the Hub that $HF_ENDPOINT and the user's token name; offline, only its cache is read."""

    def __init__(self, *, offline: bool = False, on_progress: OnProgress = silent):
        from huggingface_hub import HfApi, constants

        self.offline = offline or constants.HF_HUB_OFFLINE
        self.api = HfApi(library_name=LIBRARY)
        self.endpoint = self.api.endpoint
        self._on_progress = on_progress

    # --- reading ---

    def snapshot(self, ref: RemoteRef, *, marker: str = MANIFEST_FILE) -> Snapshot:
        """The commit that the reference means now, with the files of it.

        Args:
            marker: A file that the repository must have; offline, the cache is looked through for it.

        Raises:
            RemoteError: There is no such thing, or the Hub cannot be asked; offline, it is not in the cache.
        """
        if self.offline:
            path = self._cached_or_fetched(ref.repo, marker, ref.revision)
            return Snapshot(ref.repo, path.parents[marker.count("/")].name, None)
        info = self.ask(ref.repo, lambda: self.api.model_info(ref.repo, revision=ref.revision, files_metadata=True))
        files = {row.rfilename: _remote_file(row) for row in info.siblings or []}
        return Snapshot(ref.repo, str(info.sha), files, is_private=bool(info.private))

    def manifest(self, snapshot: Snapshot, *, revision: str | None = None) -> PackManifest:
        """The manifest at the snapshot's commit.

        Args:
            revision: What the user named; the client's cache remembers that it meant this commit.

        Raises:
            RemoteError: The repository holds no pack.
            IntegrityError: The manifest cannot be read.
        """
        listed = snapshot.files or {}
        if snapshot.files is not None and MANIFEST_FILE not in listed:
            raise RemoteError(
                f"{snapshot.repo} is no pack of lorary.",
                cause=f"commit {snapshot.commit[:12]} has no {MANIFEST_FILE}",
                fix="find packs: registry search",
            )
        source = f"The manifest of {snapshot.repo} at {snapshot.commit[:12]}"
        announced = listed.get(MANIFEST_FILE)
        if announced is not None and announced.size > MAX_BYTES:
            raise IntegrityError(
                f"{source} is too large.", cause=f"{announced.size} bytes; at most {MAX_BYTES} are read"
            )
        oid = announced.oid if announced else None
        data = self.fetch(
            snapshot,
            MANIFEST_FILE,
            is_whole=lambda data: len(data) <= MAX_BYTES and (oid is None or git_oid(data) == oid),
            revision=revision,
        )
        return PackManifest.from_json(data, source=source)

    def fetch(
        self, snapshot: Snapshot, path: str, *, is_whole: Callable[[bytes], bool], revision: str | None = None
    ) -> bytes:
        """The bytes of a file, from the client's cache or the Hub; fetched a second time if they are not whole.

        Raises:
            RemoteError: The file cannot be had, or the revision moves while it is read.
            IntegrityError: Its bytes are not whole.
        """
        for replaces_cached in (False, True):
            name = snapshot.commit if replaces_cached else revision
            data = self._download(snapshot, path, revision=name, replaces_cached=replaces_cached).read_bytes()
            if is_whole(data):
                return data
        raise IntegrityError(
            f"{path} of {snapshot.repo} at {snapshot.commit[:12]} is damaged.",
            cause=f"its {len(data)} bytes are not those that were announced"
            + (", in the cache on this machine" if self.offline else ", fetched twice"),
            fix="repeat the command" + (" without --offline" if self.offline else "; or tell who pushed it"),
        )

    def tags(self, repo: str) -> dict[str, str]:
        """Tags, and the commit of each."""
        refs = self.ask(repo, lambda: self.api.list_repo_refs(repo))
        return {ref.name: ref.target_commit for ref in refs.tags}

    def pull_requests(self, repo: str) -> dict[str, str]:
        """Pull requests as references, refs/pr/3, and the newest commit of each."""
        refs = self.ask(repo, lambda: self.api.list_repo_refs(repo, include_pull_requests=True))
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}

    # --- writing ---

    def user(self) -> str:
        """The name of the user whom the token stands for."""
        return str(self.ask("the Hub", self.api.whoami)["name"])

    def check_token(self) -> None:
        """Refuses to go on without a token.

        Raises:
            RemoteError: There is none.
        """
        from huggingface_hub import get_token

        if get_token() is None:
            raise RemoteError("You are not logged in to the Hub.", cause="there is no access token", fix=LOGIN)

    def create_repo(self, repo: str, *, private: bool) -> None:
        """Make a repository unless it is there."""
        self.ask(repo, lambda: self.api.create_repo(repo, private=private or None, exist_ok=True))

    def commit(self, repo: str, operations: Sequence[Any], **details: Any) -> tuple[str, str | None]:
        """Commit all operations at once; return the commit, and the address of the pull request if one was asked for.

        Args:
            repo: The repository.
            operations: Of huggingface_hub.
            **details: commit_message, parent_commit, create_pr.

        Raises:
            UnsureError: It may or may not have happened, or somebody else was faster.
            RemoteError: It has not happened.
        """
        try:
            info = self._ask_once(lambda: self.api.create_commit(repo, operations, **details))
        except failures() as error:
            ours = to_lorary_error(error, repo=repo, endpoint=self.endpoint)
            wait = 1.0 if status_of(error) == STALE_PARENT else wait_before_retry(error, tries=1)
            if wait is None:
                raise ours from error
            raise UnsureError(ours, wait_s=wait) from error
        return info.oid, info.pr_url

    def tag(self, repo: str, tag: str, commit: str) -> None:
        """Give a commit a tag, unless the tag is there."""
        self.ask(repo, lambda: self.api.create_tag(repo, tag=tag, revision=commit, exist_ok=True))

    # --- asking ---

    def ask(self, repo: str, question: Callable[[], Answer]) -> Answer:
        """Ask what may be asked twice, and ask again where that can help.

        Raises:
            RemoteError: There is no good answer.
        """
        start, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return self._ask_once(question)
            except failures() as error:
                wait = wait_before_retry(error, tries)
                if wait is None or tries == TRIES or time.monotonic() + wait - start > BUDGET_S:
                    raise to_lorary_error(error, repo=repo, endpoint=self.endpoint) from error
                self.rest(wait, tries)

    def rest(self, seconds: float, tries: int) -> None:
        """Wait before the next try, and say so."""
        self._on_progress(Progress(f"waiting for the Hub, try {tries + 1} of {TRIES}", 0, 0))
        time.sleep(seconds)

    def _ask_once(self, question: Callable[[], Answer]) -> Answer:
        with _bounded_session():
            return question()

    def _download(
        self, snapshot: Snapshot, path: str, *, revision: str | None = None, replaces_cached: bool = False
    ) -> Path:
        """A file of the snapshot's commit in the client's cache."""
        name = revision or snapshot.commit
        found = self._cached_or_fetched(snapshot.repo, path, name, replaces_cached=replaces_cached and not self.offline)
        commit = found.parents[path.count("/")].name
        if commit != snapshot.commit:
            raise RemoteError(
                f"{snapshot.repo} changes while it is read.",
                cause=f"{name} meant {snapshot.commit[:12]}, and then {commit[:12]}",
                fix="repeat the command",
            )
        return found

    def _cached_or_fetched(self, repo: str, path: str, revision: str | None, *, replaces_cached: bool = False) -> Path:
        def ask() -> str:
            return self.api.hf_hub_download(
                repo, path, revision=revision, force_download=replaces_cached, local_files_only=self.offline
            )

        return Path(self.ask(repo, ask))


def git_oid(data: bytes) -> str:
    """Git's digest of a file's bytes, by which the Hub names files that are not LFS files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _remote_file(row: Any) -> RemoteFile:
    return RemoteFile(
        size=row.size or 0, sha256=PREFIX + row.lfs.sha256 if row.lfs else None, oid=None if row.lfs else row.blob_id
    )


@contextmanager
def _bounded_session() -> Iterator[None]:
    """The client's HTTP session with a timeout, and without waits that are longer than a person would wait."""
    from huggingface_hub.utils import get_session

    session = get_session()
    timeout, hooks = session.timeout, session.event_hooks
    session.timeout = TIMEOUT_S
    session.event_hooks = {**hooks, "response": [*hooks.get("response", []), _refuse_long_wait]}
    try:
        yield
    finally:
        session.timeout, session.event_hooks = timeout, hooks


def _refuse_long_wait(response: Any) -> None:
    """Ends a request that the client would repeat only after a long sleep.

    Raises:
        RemoteError: Says how long the Hub wants to be left alone.
    """
    wait = wait_of(response.headers) if response.status_code in TRANSIENT else None
    if wait is not None and wait > MAX_WAIT_S:
        raise RemoteError(
            "The Hub takes no more requests for now.",
            cause=f"it answered {response.status_code} and asks to wait {wait:.0f} s",
            fix=f"repeat the command in {wait:.0f} s; it goes on where it was",
        )
