"""What went wrong with the Hub, in our errors; whether trying again can help, and after how long.

The client raises what its HTTP library, the file system and the Hub raise. Here each becomes a RemoteError that says
what to do. Nothing that the Hub sent is repeated without removing access tokens from it.
"""

import errno
import re
from typing import Any, Final

from ...domains.errors import ConflictError, IntegrityError, LoraryError, RemoteError, StorageFullError

MAX_WAIT_S: Final = 30.0  # a longer wait is the user's decision
TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})  # HTTP codes that may be gone at the next try
STALE_PARENT: Final = 412  # HTTP code for a commit on top of what is no longer the head

LOGIN: Final = "log in: hf auth login, or set $HF_TOKEN"
_TOKEN: Final = re.compile(r"hf_[A-Za-z0-9_]{6,}|(?i:bearer)\s+\S+")
_LONGEST: Final = 300  # characters of a foreign message


def failures() -> tuple[type[Exception], ...]:
    """What the client raises when something is wrong with the Hub, the network, the cache or a request."""
    from huggingface_hub.errors import XetDownloadError

    # the client trusts the form of an answer, so one that is garbled may end in any of the last three
    return (_http_error(), XetDownloadError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


def to_lorary_error(error: BaseException, *, repo: str, endpoint: str) -> LoraryError:
    """Our error for one that the client raised.

    Args:
        repo: What was asked for, such as acme/lorary-legal; or the Hub.
        endpoint: The address of the Hub.
    """
    error = root_of(error)
    if isinstance(error, LoraryError):
        return error
    status = status_of(error)
    if status is not None:
        return _by_code(error, repo, endpoint) or _by_status(status, error, repo, endpoint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space on the disk of the Hub's cache: hf cache ls"
        return StorageFullError("No space is left for the Hub's cache.", cause=said(error), fix=fix)
    if is_truncated(error):
        return IntegrityError(
            f"A file of {repo} arrives incomplete.", cause=said(error), fix="repeat the command; it goes on"
        )
    kind = type(error).__name__
    found = {
        "OfflineModeIsEnabled": (
            f"{repo}: the Hub may not be asked.",
            "$HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, and repeat the command",
        ),
        "LocalEntryNotFoundError": (
            f"{repo} is not in the Hub's cache on this machine.",
            "the Hub was not asked, because of --offline or $HF_HUB_OFFLINE",
            "repeat the command without them",
        ),
        "LocalTokenNotFoundError": ("You are not logged in to the Hub.", "there is no access token", LOGIN),
    }.get(kind)
    if found is None and is_transport(error):
        fix = f"see whether it answers: curl -I {endpoint}; another Hub is named by $HF_ENDPOINT"
        found = (f"{endpoint} cannot be reached.", f"{kind}: {said(error)}", fix)
    if found is None and is_garbled(error):
        fix = f"see what it is: curl {endpoint}; another Hub is named by $HF_ENDPOINT"
        found = (f"{endpoint} does not answer like a Hub.", f"{kind}: {said(error)}", fix)
    if found is None:
        fix = "see the traceback: repeat the command with LORARY_DEBUG=1 before it"
        found = (f"{repo}: the client of the Hub failed.", f"{kind}: {said(error)}", fix)
    message, cause, fix = found
    return RemoteError(message, cause=cause, fix=fix)


def _by_code(error: BaseException, repo: str, endpoint: str) -> LoraryError | None:
    """Our error for an answer that the Hub marked with a code of its own."""
    fixes = {
        "RevisionNotFound": ("{} has no such revision.", f"see what it has: {endpoint}/{repo}/commits/main"),
        "EntryNotFound": ("{} lacks a file.", f"look at it: {endpoint}/{repo}/tree/main"),
        "GatedRepo": ("{} is gated.", f"ask for access at {endpoint}/{repo}, then {LOGIN}"),
        "RepoNotFound": (
            "There is no {} on the Hub, or you may not see it.",
            f"check the name: registry search; if the repository is private, {LOGIN}",
        ),
    }
    found = fixes.get(getattr(error, "response", None).headers.get("X-Error-Code"))  # type: ignore[union-attr]
    return found and RemoteError(found[0].format(repo), cause=_answered(error, endpoint), fix=found[1])


def _by_status(status: int, error: BaseException, repo: str, endpoint: str) -> LoraryError:
    """Our error for any other answer."""
    cause = _answered(error, endpoint)
    if status == STALE_PARENT:
        fix = "pull what is new, and push again"
        return ConflictError(f"Somebody else has pushed to {repo} in the meantime.", cause=cause, fix=fix)
    if status == 429:
        wait = asked_wait(error)
        when = "later" if wait is None else f"in {wait:.0f} s"
        return RemoteError(
            "The Hub takes no more requests for now.", cause=cause, fix=f"repeat the command {when}; it goes on"
        )
    fixes = {
        401: ("The Hub does not accept the access token.", LOGIN),
        403: (f"The Hub does not allow that for {repo}.", "use a token that may write there, or push with --create-pr"),
        404: (f"The Hub has nothing there for {repo}.", f"look at it: {endpoint}/{repo}"),
    }
    failed = ("The Hub failed.", "repeat the command; it goes on where it was")
    refused = (f"The Hub refused what was asked for {repo}.", f"look at it: {endpoint}/{repo}")
    message, fix = fixes.get(status) or (failed if status >= 500 else refused)
    return RemoteError(message, cause=cause, fix=fix)


def _answered(error: BaseException, endpoint: str) -> str:
    return f"{endpoint} answered {status_of(error)}" + (f": {said(error)}" if said(error) else "")


def is_missing_repo(error: LoraryError) -> bool:
    """Whether the error is that there is no such repository."""
    cause = error.__cause__
    response = getattr(root_of(cause), "response", None) if cause else None
    return response is not None and response.headers.get("X-Error-Code") == "RepoNotFound"


def is_unknown(error: BaseException) -> bool:
    """Whether the Hub knows no such repository or revision, or the client that it cannot be the name of one."""
    # a gated repository is known, and its error is a kind of RepositoryNotFoundError
    return type(root_of(error)).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError")


def wait_before_retry(error: BaseException, tries: int) -> float | None:
    """Seconds to wait before the next try, after so many; None where another try cannot help or must wait too long."""
    error = root_of(error)
    status = status_of(error)
    is_transient = (
        status in TRANSIENT if status is not None else (is_transport(error) or is_truncated(error) or is_garbled(error))
    )
    if not is_transient:
        return None
    wait = asked_wait(error)
    wait = min(2.0 ** (tries - 1), 8.0) if wait is None else wait
    return wait if wait <= MAX_WAIT_S else None


def asked_wait(error: BaseException) -> float | None:
    """Seconds for which the Hub asks to be left alone."""
    response = getattr(error, "response", None)
    return None if response is None else wait_of(response.headers)


def wait_of(headers: Any) -> float | None:
    """Seconds that the headers of an answer ask to wait: of the rate limit if it is used up, or Retry-After."""
    limit = re.search(r"r=0\s*;\s*t=(\d{1,9})", headers.get("ratelimit") or "")
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("retry-after") or "")
    found = limit or after
    return float(found[1]) if found else None


def root_of(error: BaseException) -> BaseException:
    """The error behind one that the client put around it."""
    wrappers = ("RuntimeError", "LocalEntryNotFoundError", "RevisionResolutionError")
    while type(error).__name__ in wrappers and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP code of the Hub's answer."""
    response = getattr(root_of(error), "response", None)
    return getattr(response, "status_code", None)


def is_transport(error: BaseException) -> bool:
    """Whether there was no whole answer: no connection, a timeout, a connection that ended early, endless redirects."""
    return isinstance(error, _http_error()) or type(error).__name__ == "XetDownloadError"


def is_truncated(error: BaseException) -> bool:
    """Whether the client found a file to be of another size than was announced."""
    return type(error) is OSError and "Consistency check failed" in str(error)


def is_garbled(error: BaseException) -> bool:
    """Whether an answer is no JSON, or not of the form that the client expects."""
    return type(error).__name__ == "JSONDecodeError" or isinstance(error, KeyError | TypeError | AttributeError)


def said(error: BaseException) -> str:
    """What the Hub said, on one line, without access tokens."""
    text = getattr(error, "server_message", None)
    if text is None and getattr(error, "response", None) is None:
        text = str(error)
    words = " ".join(_TOKEN.sub("***", text or "").split())
    return words if len(words) <= _LONGEST else words[:_LONGEST] + "..."


def _http_error() -> type[Exception]:
    """The base of the errors of httpx or httpx2, whichever the client uses."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError
