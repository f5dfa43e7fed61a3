"""Translate failures of huggingface_hub into errors of ours, and decide whether and when to retry.

The client raises what its HTTP library, the file system and the Hub raise. Each becomes a `LoraryError` with a fix.
Access tokens are removed from every server message that is shown.
"""

import errno
import re
from typing import Any, Final

from ...domains.errors import ConflictError, IntegrityError, LoraryError, RemoteError, StorageFullError

MAX_RETRY_DELAY_S: Final = 30.0  # a longer delay is left to the user
RETRYABLE_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
STALE_PARENT: Final = 412  # status if parent_commit is no longer the head

LOGIN: Final = "log in: hf auth login, or set $HF_TOKEN"
_TOKEN: Final = re.compile(r"hf_[A-Za-z0-9_]{6,}|(?i:bearer)\s+\S+")
_MAX_MESSAGE: Final = 300  # characters of a server message


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exception types that huggingface_hub raises for the Hub, the network, the cache or a bad request."""
    from huggingface_hub.errors import XetDownloadError

    # the client does not validate responses, so a malformed one may end in any of the last three
    return (_http_error(), XetDownloadError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


def to_lorary_error(error: BaseException, *, repo: str, endpoint: str) -> LoraryError:
    """Convert an exception of huggingface_hub.

    Args:
        repo: The repository in question, or `the Hub`.
        endpoint: URL of the Hub.
    """
    error = root_cause(error)
    if isinstance(error, LoraryError):
        return error
    status = http_status(error)
    if status is not None:
        return _from_error_code(error, repo, endpoint) or _from_status(status, error, repo, endpoint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free space on the disk of the Hub's cache: hf cache ls"
        return StorageFullError("No space left for the Hub's cache.", cause=_message(error), fix=fix)
    if _is_truncated(error):
        return IntegrityError(
            f"A file of {repo} arrived incomplete.", cause=_message(error), fix="repeat the command; it resumes"
        )
    kind = type(error).__name__
    found = {
        "OfflineModeIsEnabled": (
            f"{repo}: offline mode is on.",
            "$HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, and repeat the command",
        ),
        "LocalEntryNotFoundError": (
            f"{repo} is not in the Hub's cache on this machine.",
            "the Hub was not contacted, because of --offline or $HF_HUB_OFFLINE",
            "repeat the command without them",
        ),
        "LocalTokenNotFoundError": ("You are not logged in to the Hub.", "there is no access token", LOGIN),
    }.get(kind)
    if found is None and _is_connection_error(error):
        fix = f"check that it answers: curl -I {endpoint}; $HF_ENDPOINT selects another Hub"
        found = (f"{endpoint} cannot be reached.", f"{kind}: {_message(error)}", fix)
    if found is None and _is_malformed_response(error):
        fix = f"check what it is: curl {endpoint}; $HF_ENDPOINT selects another Hub"
        found = (f"{endpoint} does not answer like a Hub.", f"{kind}: {_message(error)}", fix)
    if found is None:
        fix = "see the traceback: repeat the command with LORARY_DEBUG=1"
        found = (f"{repo}: huggingface_hub failed.", f"{kind}: {_message(error)}", fix)
    message, cause, fix = found
    return RemoteError(message, cause=cause, fix=fix)


def _from_error_code(error: BaseException, repo: str, endpoint: str) -> LoraryError | None:
    """Convert a response that has the header X-Error-Code."""
    fixes = {
        "RevisionNotFound": ("{} has no such revision.", f"see its commits: {endpoint}/{repo}/commits/main"),
        "EntryNotFound": ("{} lacks a file.", f"see its files: {endpoint}/{repo}/tree/main"),
        "GatedRepo": ("{} is gated.", f"request access at {endpoint}/{repo}, then {LOGIN}"),
        "RepoNotFound": (
            "{} does not exist on the Hub, or you have no access to it.",
            f"check the name: registry search; if the repository is private, {LOGIN}",
        ),
    }
    found = fixes.get(getattr(error, "response", None).headers.get("X-Error-Code"))  # type: ignore[union-attr]
    return found and RemoteError(found[0].format(repo), cause=_response_summary(error, endpoint), fix=found[1])


def _from_status(status: int, error: BaseException, repo: str, endpoint: str) -> LoraryError:
    """Convert any other response."""
    cause = _response_summary(error, endpoint)
    if status == STALE_PARENT:
        fix = "pull the new commits, and push again"
        return ConflictError(f"{repo} was changed by another push in the meantime.", cause=cause, fix=fix)
    if status == 429:
        delay = _retry_after_of(error)
        when = "later" if delay is None else f"in {delay:.0f} s"
        return RemoteError(
            "The Hub accepts no more requests for now.", cause=cause, fix=f"repeat the command {when}; it resumes"
        )
    fixes = {
        401: ("The Hub rejected the access token.", LOGIN),
        403: (
            f"You have no permission for this on {repo}.",
            "use a token with write access, or push with --create-pr",
        ),
        404: (f"The Hub found nothing there for {repo}.", f"check the repository: {endpoint}/{repo}"),
    }
    failed = ("The Hub failed.", "repeat the command; it resumes")
    rejected = (f"The Hub rejected a request for {repo}.", f"check the repository: {endpoint}/{repo}")
    message, fix = fixes.get(status) or (failed if status >= 500 else rejected)
    return RemoteError(message, cause=cause, fix=fix)


def _response_summary(error: BaseException, endpoint: str) -> str:
    return f"{endpoint} answered {http_status(error)}" + (f": {_message(error)}" if _message(error) else "")


def is_missing_repo(error: LoraryError) -> bool:
    """Return whether the error was converted from the Hub's RepoNotFound."""
    cause = error.__cause__
    response = getattr(root_cause(cause), "response", None) if cause else None
    return response is not None and response.headers.get("X-Error-Code") == "RepoNotFound"


def is_not_found(error: BaseException) -> bool:
    """Return whether the repository or revision does not exist, or its name is not valid."""
    # GatedRepoError is a subclass of RepositoryNotFoundError, so compare names
    return type(root_cause(error)).__name__ in (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "HFValidationError",
    )


def retry_delay(error: BaseException, attempt: int) -> float | None:
    """Return the delay in seconds before the next attempt; None if a retry cannot help or would have to wait too long.

    The delay is the server's Retry-After, or exponential backoff from 1 to 8 s.

    Args:
        attempt: Number of the attempt that failed, from 1.
    """
    error = root_cause(error)
    status = http_status(error)
    if status is None:
        is_retryable = _is_connection_error(error) or _is_truncated(error) or _is_malformed_response(error)
    else:
        is_retryable = status in RETRYABLE_STATUS
    if not is_retryable:
        return None
    delay = _retry_after_of(error)
    delay = min(2.0 ** (attempt - 1), 8.0) if delay is None else delay
    return delay if delay <= MAX_RETRY_DELAY_S else None


def retry_after(headers: Any) -> float | None:
    """Return the server's Retry-After delay in seconds, or the reset time of a RateLimit that is used up."""
    limit = re.search(r"r=0\s*;\s*t=(\d{1,9})", headers.get("ratelimit") or "")
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("retry-after") or "")
    found = limit or after
    return float(found[1]) if found else None


def _retry_after_of(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    return None if response is None else retry_after(response.headers)


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that the client wrapped in a more general one."""
    wrappers = ("RuntimeError", "LocalEntryNotFoundError", "RevisionResolutionError")
    while type(error).__name__ in wrappers and error.__cause__ is not None:
        error = error.__cause__
    return error


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of the response; None if there was none."""
    response = getattr(root_cause(error), "response", None)
    return getattr(response, "status_code", None)


def _is_connection_error(error: BaseException) -> bool:
    """Return whether there was no complete response: no connection, a timeout, a closed connection, a redirect loop."""
    return isinstance(error, _http_error()) or type(error).__name__ == "XetDownloadError"


def _is_truncated(error: BaseException) -> bool:
    """Return whether a downloaded file has another size than the Hub announced."""
    return type(error) is OSError and "Consistency check failed" in str(error)


def _is_malformed_response(error: BaseException) -> bool:
    """Return whether a response is not JSON, or not of the structure that the client expects."""
    return type(error).__name__ == "JSONDecodeError" or isinstance(error, KeyError | TypeError | AttributeError)


def _message(error: BaseException) -> str:
    """Return the server's or the exception's message on one line, without access tokens."""
    text = getattr(error, "server_message", None)
    if text is None and getattr(error, "response", None) is None:
        text = str(error)
    words = " ".join(_TOKEN.sub("***", text or "").split())
    return words if len(words) <= _MAX_MESSAGE else words[:_MAX_MESSAGE] + "..."


def _http_error() -> type[Exception]:
    """Return the base class of the HTTP errors of httpx or httpx2, whichever the client uses."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError
