"""The Hub server of the tests behaves to the unmodified huggingface_hub client as the real one does."""

import os

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "acme/lorary-legal"
CARD = b"---\nlicense: mit\ntags: [lorary]\nbase_model: a/b\n---\n# Hi\n"
WEIGHTS = os.urandom(3000)


@pytest.fixture
def api(local_hub):
    """Alice's client, with one repository of three files."""
    api = HfApi()
    api.create_repo(REPO)
    files = {"README.md": CARD, "lorary.json": b"{}", "a/b.safetensors": WEIGHTS}
    api.create_commit(REPO, [CommitOperationAdd(*file) for file in files.items()], commit_message="one")
    return api


def commit(api, path="x", data=b"y", **more):
    return api.create_commit(REPO, [CommitOperationAdd(path, data)], commit_message="two", **more)


def test_whoami_resolves_the_token(api):
    assert api.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_nobody")


def test_committed_files_are_downloaded_unchanged(api, local_hub):
    folder = snapshot_download(REPO)

    with open(f"{folder}/a/b.safetensors", "rb") as file:
        assert file.read() == WEIGHTS
    assert {token for server, _, _, token in local_hub.requests if server == "storage"} == {None}


def test_a_large_file_is_uploaded_in_parts(api, local_hub, tmp_path):
    local_hub.multipart_size = 1000
    (tmp_path / "large").write_bytes(os.urandom(2500))

    commit(api, "c.safetensors", tmp_path / "large")

    assert local_hub.repos.read(REPO, "c.safetensors") == (tmp_path / "large").read_bytes()
    assert sum(method == "PUT" and "?" in path for _, method, path, _ in local_hub.requests) == 3


def test_a_stale_parent_is_refused(api):
    before = api.repo_info(REPO).sha
    commit(api)

    with pytest.raises(HfHubHTTPError) as raised:
        commit(api, data=b"z", parent_commit=before)
    assert raised.value.response.status_code == 412


def test_tags_pull_requests_and_deletions(api):
    first = api.repo_info(REPO).sha
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_commit(REPO, [CommitOperationDelete("lorary.json")], commit_message="less")
    pull = commit(api, create_pr=True)

    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert refs.pull_requests is not None
    assert refs.pull_requests[0].target_commit == pull.oid
    assert pull.pr_url is not None
    assert pull.pr_url.endswith("/discussions/1")
    assert api.file_exists(REPO, "lorary.json", revision="v1")
    assert not api.file_exists(REPO, "lorary.json")
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["less", "one", "initial commit"]


def test_a_large_tree_is_paginated(api, local_hub):
    local_hub.page_size = 2

    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 4


def test_models_are_found_by_text_tag_and_base_model(api):
    assert [model.id for model in api.list_models(search="LEGAL", filter=["lorary", "base_model:adapter:a/b"])] == [
        REPO
    ]
    assert [model.id for model in api.list_models(author="acme", limit=1)] == [REPO]
    assert not list(api.list_models(filter="other"))


def test_missing_forbidden_and_gated_repositories_have_their_own_errors(api, local_hub):
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("acme/none")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("acme/none", token=False)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none")
    with pytest.raises(HfHubHTTPError, match="403"):
        commit(api, token="hf_carol")
    local_hub.repos.all[REPO].gated = True
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(REPO, "lorary.json", token="hf_carol")


@pytest.mark.parametrize(("kind", "value"), [("cut", 100), ("status", 429)])
def test_a_client_that_resumes_gets_the_whole_file(api, local_hub, monkeypatch, kind, value):
    monkeypatch.setattr("time.sleep", lambda _: None)
    local_hub.fault("GET /[0-9a-f]{64}", kind, value)

    with open(api.hf_hub_download(REPO, "a/b.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS
    assert not [fault for fault in local_hub.faults if fault.times]


def test_other_faults_reach_the_client(api, local_hub):
    local_hub.fault("GET /[0-9a-f]{64}", "short", 10)
    local_hub.fault("POST .*/commit/", "after", 500)

    with pytest.raises(OSError, match="Consistency check failed"):
        api.hf_hub_download(REPO, "a/b.safetensors")
    with pytest.raises(HfHubHTTPError):
        commit(api)
    assert api.list_repo_commits(REPO)[0].title == "two"
