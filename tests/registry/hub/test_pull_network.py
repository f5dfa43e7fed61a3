"""Pulling from a Hub that fails, is down, or is not contacted offline."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from lorary.domains.errors import IntegrityError, RemoteError

REPO = "acme/lorary-legal"
LARGE = "adapter_model.safetensors"


@pytest.mark.parametrize(
    "fault", [("status", 503), ("status", 429), ("drop", 0), ("cut", 100), ("short", 5), ("status", 500)]
)
@pytest.mark.parametrize("pattern", ["GET /[0-9a-f]{64}", "GET .*/resolve/", "HEAD .*/resolve/", "GET /api/models/"])
def test_a_temporary_failure_is_retried(ours, local_hub, pattern, fault):
    local_hub.fault(pattern, *fault)

    assert ours.pull(REPO).is_new


def test_an_interrupted_pull_resumes(ours, local_hub):
    local_hub.fault("HEAD .*/router/", "status", 503, times=99)
    with pytest.raises(RemoteError):
        ours.pull(REPO)
    assert ours.store.domains() == ["general"]
    local_hub.faults.clear()
    asked = len(local_hub.requests)

    assert ours.pull(REPO).is_new
    fetched = [path for _, _, path, _ in local_hub.requests[asked:]]
    assert not [path for path in fetched if path.endswith(LARGE)]
    assert [path for path in fetched if path.endswith("router.safetensors")]


def test_a_long_retry_after_is_left_to_the_user(ours, local_hub, no_waiting):
    local_hub.fault("GET /[0-9a-f]{64}", "status", 429, times=9, RateLimit='"resolvers";r=0;t=212')

    with pytest.raises(RemoteError) as raised:
        ours.pull(REPO)

    assert "212 s" in str(raised.value.fix)
    assert no_waiting == []


def test_retry_after_is_respected(ours, local_hub, no_waiting):
    local_hub.fault("GET /api/models/", "status", 429, Retry_After="12")

    assert ours.pull(REPO).is_new
    assert no_waiting == [12.0]


@pytest.mark.parametrize(
    ("source", "token", "said"),
    [
        ("acme/none", "hf_alice", "acme/none does not exist on the Hub"),
        ("acme/none", "", "acme/none does not exist on the Hub"),
        (f"{REPO}@v9", "hf_alice", "has no such revision"),
        (REPO, "hf_nobody", "rejected the access token"),
    ],
)
def test_a_missing_or_forbidden_repository_is_explained(ours, monkeypatch, source, token, said):
    monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(RemoteError, match=said) as raised:
        ours.pull(source)
    assert raised.value.exit_code == 7
    assert raised.value.fix


def test_the_error_of_a_gated_repository_says_where_to_request_access(ours, local_hub, monkeypatch):
    local_hub.repos.all[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_carol")

    with pytest.raises(RemoteError, match="is gated") as raised:
        ours.pull(REPO)
    assert f"{local_hub.url}/{REPO}" in str(raised.value.fix)


def test_a_repository_without_a_pack_is_refused(ours):
    HfApi().create_repo("acme/other")

    with pytest.raises(RemoteError, match="is not a lorary pack"):
        ours.pull("acme/other")


def test_a_redirect_loop_is_an_error(ours, local_hub):
    local_hub.fault("GET /api/models/", "redirect", times=999)

    with pytest.raises(RemoteError, match="cannot be reached"):
        ours.pull(REPO)


def test_offline_the_cache_serves_another_registry(ours, theirs, light_store, local_hub):
    ours.pull(f"{REPO}@v1")
    ours.pull(REPO)
    asked = len(local_hub.requests)
    third = light_store("third")

    for source in (f"{REPO}@v1", REPO):
        done = third.pull(source, offline=True)
        assert (done.is_new, done.is_checked) == (True, False)

    assert third.show("legal").to_json() == theirs.show("legal").to_json()
    assert len(local_hub.requests) == asked


def test_offline_a_repository_that_is_not_cached_is_an_error(ours, local_hub):
    asked = len(local_hub.requests)

    with pytest.raises(RemoteError, match="not in the Hub's cache"):
        ours.pull(REPO, offline=True)
    assert len(local_hub.requests) == asked


def test_damaged_bytes_in_the_cache_are_fetched_again_but_not_offline(ours, theirs, light_store):
    ours.pull(REPO)
    for blob in Path(constants.HF_HUB_CACHE).glob("*/blobs/*"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    third = light_store("third")

    with pytest.raises(IntegrityError):
        third.pull(REPO, offline=True)
    assert third.store.domains() == ["general"]
    assert third.pull(REPO).manifest.digest == theirs.show("legal").digest


def test_an_outdated_branch_in_the_cache_is_not_used_when_the_hub_is_down(ours, local_hub):
    ours.pull(REPO)
    local_hub.stop()

    with pytest.raises(RemoteError, match="cannot be reached"):
        ours.pull(REPO)


def test_the_token_is_sent_to_the_hub_only(ours, local_hub):
    ours.pull(REPO)

    tokens = {(server, token) for server, _, _, token in local_hub.requests}
    assert ("hub", "hf_alice") in tokens
    assert {token for server, token in tokens if server == "storage"} == {None}
