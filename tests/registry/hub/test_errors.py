"""Every failure of the Hub becomes one of our errors, with a cause, a fix, and without the token."""

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError

from lorary.domains.errors import ConflictError, IntegrityError, LoraryError, RemoteError, StorageFullError
from lorary.registry.hub.errors import is_missing_repo, retry_after, retry_delay, to_lorary_error

REPO = "acme/lorary-legal"


@pytest.fixture
def failed(local_hub, no_waiting):
    """`failed(status, **headers)` returns the exception that the client raises for this response."""

    def fail(status, **headers):
        local_hub.fault("GET /api/models/", "status", status, **headers)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            HfApi().model_info(REPO)
        return raised.value

    return fail


def explain(error):
    return to_lorary_error(error, repo=REPO, endpoint="https://hub.example")


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (404, "RepoNotFound", RemoteError, "does not exist on the Hub"),
        (401, "RepoNotFound", RemoteError, "does not exist on the Hub"),
        (404, "RevisionNotFound", RemoteError, "has no such revision"),
        (404, "EntryNotFound", RemoteError, "lacks a file"),
        (403, "GatedRepo", RemoteError, "is gated"),
        (404, "", RemoteError, "found nothing there"),
        (401, "", RemoteError, "rejected the access token"),
        (403, "", RemoteError, "no permission"),
        (400, "", RemoteError, "rejected a request"),
        (409, "", RemoteError, "rejected a request"),
        (412, "", ConflictError, "another push"),
        (429, "", RemoteError, "accepts no more requests"),
        (500, "", RemoteError, "The Hub failed"),
        (503, "", RemoteError, "The Hub failed"),
        (599, "", RemoteError, "The Hub failed"),
    ],
)
def test_a_response_becomes_our_error(failed, status, code, kind, said):
    error = explain(failed(status, **({"X_Error_Code": code} if code else {})))

    assert type(error) is kind
    assert said in error.message
    assert f"answered {status}" in str(error.cause)
    assert error.fix


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OfflineModeIsEnabled("x"), RemoteError, "offline mode is on"),
        (LocalEntryNotFoundError("x"), RemoteError, "not in the Hub's cache"),
        (OSError("Consistency check failed: file should be of size 9 but has size 5"), IntegrityError, "incomplete"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageFullError, "No space"),
        (XetDownloadError("x"), RemoteError, "cannot be reached"),
        (KeyError("ref"), RemoteError, "does not answer like a Hub"),
        (ValueError("odd"), RemoteError, "huggingface_hub failed"),
    ],
)
def test_an_exception_of_the_client_becomes_our_error(error, kind, said):
    ours = explain(error)

    assert type(ours) is kind
    assert said in ours.message
    assert ours.cause
    assert ours.fix


def test_a_wrapped_exception_is_unwrapped(failed):
    inner = failed(403)
    outer = RuntimeError("Error while uploading 'x' to the Hub.")
    outer.__cause__ = inner

    assert "no permission" in explain(outer).message


def test_our_own_errors_pass_through():
    ours = LoraryError("x")

    assert explain(ours) is ours


def test_a_missing_repository_is_known_by_its_code(failed):
    for code, is_missing in (("RepoNotFound", True), ("RevisionNotFound", False), ("GatedRepo", False)):
        error = explain(cause := failed(404, X_Error_Code=code))
        error.__cause__ = cause
        assert is_missing_repo(error) is is_missing


@pytest.mark.parametrize("text", ["token hf_abcDEF123456789", "Bearer abc.def-123", "header: bearer XYZ"])
def test_access_tokens_are_removed(failed, text):
    cause = str(explain(failed(500, X_Error_Message=text)).cause)

    assert "***" in cause
    assert not {"hf_abcDEF123456789", "abc.def-123", "XYZ"} & set(cause.split())


def test_a_long_message_is_truncated(failed):
    assert len(str(explain(failed(500, X_Error_Message="x" * 5000)).cause)) < 400


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=12;t=55'}, None),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 55.0),
        ({"retry-after": "9" * 40}, None),
    ],
)
def test_the_delay_is_read_from_the_headers(headers, wait):
    assert retry_after(headers) == wait


@pytest.mark.parametrize(
    ("status", "headers", "tries", "wait"),
    [
        (503, {}, 1, 1.0),
        (503, {}, 2, 2.0),
        (503, {}, 9, 8.0),
        (429, {"retry-after": "5"}, 1, 5.0),
        (429, {"retry-after": "31"}, 1, None),
        (404, {}, 1, None),
        (403, {"retry-after": "1"}, 1, None),
        (412, {}, 1, None),
    ],
)
def test_only_temporary_errors_are_retried(status, headers, tries, wait):
    error = OSError()
    error.response = SimpleNamespace(status_code=status, headers=headers)  # type: ignore[attr-defined]

    assert retry_delay(error, tries) == wait
