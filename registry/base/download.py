"""Download one pinned file: resumable, checked by its digest, and in its place only when it is whole."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from ...domains.errors import IntegrityError, RemoteError, StorageFullError
from ...domains.progress import OnProgress, Progress
from ..store.blobs import sha256_of_file
from ..store.files import delete, move

PART: Final = ".part"  # suffix of what has arrived so far
ATTEMPTS: Final = 3  # each goes on where the one before was cut off
TIMEOUT_S: Final = 60.0
_CHUNK: Final = 1 << 20  # bytes
_YES: Final = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads $HF_HUB_OFFLINE


def download(
    url: str, path: Path, *, size: int, sha256: str, instead: str, stage: str, on_progress: OnProgress
) -> None:
    """Download a file of known size and digest to `path`; what an earlier call has got is not asked for again.

    Args:
        instead: What the user can do without network, as a fix.
        stage: Name of the stage in progress reports.

    Raises:
        RemoteError: It cannot be reached, or the connection broke; what arrived is kept.
        IntegrityError: The bytes are others; they are deleted.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES and not url.startswith("file:"):
        raise RemoteError(
            f"{path.name} is not on this machine, and offline mode is on.",
            cause=f"HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']}",
            fix=f"unset HF_HUB_OFFLINE, and repeat the command; or {instead}",
        )
    part = path.with_name(path.name + PART)
    last: Exception | None = None
    for _ in range(ATTEMPTS):
        if _size(part) >= size:
            break
        try:
            _append(url, part, size=size, report=lambda done: on_progress(Progress(stage, done, size)))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            last = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
    _check(part, url, size=size, sha256=sha256, last=last, instead=instead)
    move(part, path)


def _append(url: str, part: Path, *, size: int, report: Any) -> None:
    """Append to what has arrived; begin again if the server does not continue files."""
    done = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        continues = done and getattr(answer, "status", None) == http.client.PARTIAL_CONTENT
        done = done if continues else 0
        with part.open("ab" if continues else "wb") as file:
            while done <= size and (chunk := answer.read(_CHUNK)):
                _write(file, chunk, part)
                done += len(chunk)
                report(min(done, size))


def _write(file: Any, chunk: bytes, part: Path) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise StorageFullError(
            f"Cannot write {part}.", cause=error.strerror, fix="free some space, and repeat the command; it resumes"
        ) from error


def _check(part: Path, url: str, *, size: int, sha256: str, last: Exception | None, instead: str) -> None:
    found = _size(part)
    if found < size:
        reason = f"{type(last).__name__}: {last}" if last else "the connection was closed"
        raise RemoteError(
            f"{url} cannot be downloaded.",
            cause=f"{reason}; {found:,} of {size:,} bytes have arrived",
            fix=f"repeat the command, which resumes; or {instead}",
        )
    digest = sha256_of_file(part)
    if digest != sha256:
        delete(part)
        raise IntegrityError(
            f"{url} gave another file than the one that is pinned.",
            cause=f"expected {size:,} bytes with {sha256}, found {found:,} bytes with {digest}",
            fix=f"repeat the command; if it happens again, {instead}",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
