"""Pushing light packs to a local Hub server through the unmodified client."""

import threading
from dataclasses import replace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from lorary.domains.errors import ConflictError, InputError, IntegrityError, RemoteError
from lorary.registry.store.manifest import PackManifest

REPO = "acme/lorary-legal"


@pytest.fixture
def registry(local_hub, light_store, light_pack, no_waiting):
    """A registry with the domain legal, beside a Hub."""
    registry = light_store("store")
    light_pack(registry)
    return registry


def on_hub(local_hub, path="lorary.json", revision="main", repo=REPO):
    return local_hub.repos.read(repo, path, revision)


def titles(repo=REPO):
    return [commit.title for commit in HfApi().list_repo_commits(repo)]


def test_a_push_is_one_commit_with_a_tag(registry, local_hub):
    done = registry.push("legal", REPO)

    manifest = registry.show("legal")
    assert (done.state, done.tag) == ("pushed", "v1")
    assert titles() == ["legal, version 1", "initial commit"]
    assert on_hub(local_hub) == manifest.to_json()
    for file in manifest.files:
        assert on_hub(local_hub, file.path) == registry.store.read(manifest, file.path)
    assert on_hub(local_hub, revision="v1") == manifest.to_json()
    assert ModelCard(on_hub(local_hub, "README.md").decode()).data.get("library_name") == "peft"


def test_pushing_the_same_version_again_changes_nothing(registry, local_hub):
    first = registry.push("legal", REPO)
    asked = len(local_hub.requests)

    again = registry.push("legal", REPO)

    assert (again.state, again.commit, again.tag) == ("there", first.commit, "v1")
    assert {method for _, method, _, _ in local_hub.requests[asked:]} <= {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("destination", "repo"), [(None, "alice/lorary-legal"), ("acme", REPO), (f"hf://{REPO}", REPO)]
)
def test_a_destination_may_be_short(registry, destination, repo):
    assert registry.push("legal", destination).repo == repo


def test_the_next_version_replaces_the_files_of_the_previous_one(registry, local_hub, light_pack):
    registry.push("legal", REPO)
    first = registry.show("legal@1")
    fewer = {"router/router.json": (b'"two"', "router")}
    registry.store.commit(replace(first, version=0, files=(), description="two"), fewer)

    done = registry.push("legal", REPO)

    assert set(done.removed) == {file.path for file in first.files} - {"router/router.json"}
    assert {file.path for file in done.files if file.is_new} == {"lorary.json", "README.md", "router/router.json"}
    assert set(HfApi().list_repo_files(REPO)) == {".gitattributes", "README.md", "lorary.json", "router/router.json"}
    assert PackManifest.from_json(on_hub(local_hub, revision="v1"), source="").version == 1
    assert PackManifest.from_json(on_hub(local_hub, revision="v2"), source="").version == 2


def test_a_dry_run_changes_nothing(registry, local_hub):
    done = registry.push("legal", REPO, dry_run=True)

    assert (done.state, done.makes_repo, done.commit) == ("planned", True, None)
    assert "# lorary-legal" in done.card
    assert local_hub.repos.all == {}


def test_a_dry_run_lists_new_files(registry, light_pack, local_hub):
    registry.push("legal", REPO)
    light_pack(registry, text="two")

    done = registry.push("legal", REPO, dry_run=True)

    assert (done.state, done.makes_repo, done.tag) == ("planned", False, "v2")
    new = {file.path for file in done.files if file.is_new}
    assert {"lorary.json", "README.md", "adapter_model.safetensors"} <= new
    assert not {"adapter_config.json", "router/router.safetensors"} & new
    assert len(titles()) == 2


def test_a_new_repository_can_be_private(registry, local_hub):
    registry.push("legal", REPO, private=True)

    assert local_hub.repos.all[REPO].private
    registry.push("legal", REPO, private=True)


def test_private_refuses_an_existing_public_repository(registry):
    registry.push("legal", REPO)

    with pytest.raises(ConflictError, match="is public"):
        registry.push("legal", REPO, private=True)


def test_a_pull_request_is_opened_once(registry, light_pack, local_hub, monkeypatch):
    registry.push("legal", REPO)
    light_pack(registry, text="two")
    monkeypatch.setenv("HF_TOKEN", "hf_carol")

    first = registry.push("legal", REPO, create_pr=True, message="Mine")
    again = registry.push("legal", REPO, create_pr=True)

    assert (first.state, again.state) == ("proposed", "there")
    assert first.pull_request == again.pull_request == f"{local_hub.url}/{REPO}/discussions/1"
    assert titles()[0] == "legal, version 1"
    assert "tags/v2" not in local_hub.repos.all[REPO].refs


def test_a_pull_request_needs_a_repository(registry, local_hub):
    with pytest.raises(RemoteError, match="acme/lorary-legal does not exist, so no pull request"):
        registry.push("legal", REPO, create_pr=True)
    assert local_hub.repos.all == {}


# --- repositories that exist ---


def test_a_repository_of_another_domain_is_a_conflict(registry, light_pack):
    registry.push("legal", REPO)
    light_pack(registry, "medicine")

    with pytest.raises(ConflictError) as raised:
        registry.push("medicine", REPO)
    assert "contains the domain 'legal'" in str(raised.value.cause)


def test_an_older_version_does_not_replace_a_newer_one(registry, light_pack):
    light_pack(registry, text="two")
    registry.push("legal", REPO)

    with pytest.raises(ConflictError) as raised:
        registry.push("legal@1", REPO)
    assert "has version 2 already" in str(raised.value.cause)


def test_another_pack_with_the_same_version_is_a_conflict(registry, light_pack, light_store):
    registry.push("legal", REPO)
    other = light_store("other")
    light_pack(other, text="else")

    with pytest.raises(ConflictError) as raised:
        other.push("legal", REPO)
    assert "another version 1" in str(raised.value.cause)
    assert raised.value.exit_code == 4


def test_files_of_another_kind_of_repository_are_not_replaced(registry):
    api = HfApi()
    api.create_repo(REPO)
    api.create_commit(REPO, [CommitOperationAdd("adapter_model.safetensors", b"x")], commit_message="mine")

    with pytest.raises(ConflictError) as raised:
        registry.push("legal", REPO)
    assert "adapter_model.safetensors" in str(raised.value.cause)


def test_a_missing_tag_is_created_without_a_commit(registry, local_hub):
    registry.push("legal", REPO)
    del local_hub.repos.all[REPO].refs["tags/v1"]

    done = registry.push("legal", REPO)

    assert done.state == "there"
    assert local_hub.repos.all[REPO].refs["tags/v1"] == done.commit
    assert len(titles()) == 2


def test_a_damaged_version_is_not_pushed(registry, local_hub):
    path = registry.store.blobs.path(registry.show("legal").files[0].sha256)
    path.chmod(0o644)
    path.write_bytes(b"x")

    with pytest.raises(IntegrityError):
        registry.push("legal", REPO)
    assert local_hub.repos.all == {}


# --- concurrent pushes, and a Hub that fails ---


def test_a_push_is_repeated_on_top_of_a_concurrent_commit(registry, light_pack, local_hub):
    """The card is edited during the push, which is then repeated on top of that commit."""
    registry.push("legal", REPO)
    light_pack(registry, text="two")
    local_hub.fault("POST .*/commit/", "status", 412)

    registry.push("legal", REPO)

    assert titles() == ["legal, version 2", "legal, version 1", "initial commit"]


def test_one_of_two_concurrent_pushes_is_a_conflict(registry, light_pack, light_store, local_hub):
    registry.push("legal", REPO)
    other = light_store("other")
    light_pack(other, text="one")
    for each, text in ((registry, "two"), (other, "else")):
        light_pack(each, text=text)
    outcomes = []

    def try_push(each):
        try:
            outcomes.append(each.push("legal", REPO).state)
        except ConflictError as error:
            outcomes.append(error.exit_code)

    threads = [threading.Thread(target=try_push, args=(each,)) for each in (registry, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(str, outcomes)) == ["4", "pushed"]
    assert len(titles()) == 3


def test_a_push_that_keeps_losing_the_race_is_a_conflict(registry, light_pack, local_hub):
    registry.push("legal", REPO)
    light_pack(registry, text="two")
    local_hub.fault("POST .*/commit/", "status", 412, times=99)

    with pytest.raises(ConflictError, match="another push"):
        registry.push("legal", REPO)
    assert len(titles()) == 2


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_commit_with_a_lost_response_is_recognised(registry, local_hub, status):
    local_hub.fault("POST .*/commit/", "after", status)

    assert registry.push("legal", REPO).state == "pushed"
    assert titles() == ["legal, version 1", "initial commit"]


def test_a_pull_request_with_a_lost_response_is_recognised(registry, light_pack, local_hub):
    registry.push("legal", REPO)
    light_pack(registry, text="two")
    local_hub.fault("POST .*/commit/", "after", 500)

    done = registry.push("legal", REPO, create_pr=True)

    assert done.pull_request == f"{local_hub.url}/{REPO}/discussions/1"
    assert [ref for ref in local_hub.repos.all[REPO].refs if ref.startswith("pr/")] == ["pr/1"]


@pytest.mark.parametrize(
    "pattern", ["POST .*/preupload/", "POST .*/batch", "PUT ", "POST .*/validate-yaml", "POST .*/tag/"]
)
def test_a_temporary_failure_is_retried(registry, local_hub, pattern):
    local_hub.fault(pattern, "status", 503)

    assert registry.push("legal", REPO).state == "pushed"


def test_a_hub_that_keeps_failing_is_an_error_and_nothing_is_pushed(registry, local_hub):
    local_hub.fault("POST .*/commit/", "status", 503, times=99)

    with pytest.raises(RemoteError, match="The Hub failed"):
        registry.push("legal", REPO)
    assert titles() == ["initial commit"]


def test_a_push_without_permission_or_login_is_an_error(registry, monkeypatch):
    registry.push("legal", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_carol")
    with pytest.raises(RemoteError) as raised:
        registry.push("general", "acme")
    assert "403" in str(raised.value.cause)

    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(RemoteError, match="not logged in"):
        registry.push("legal", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(RemoteError, match="rejected the access token"):
        registry.push("legal", REPO)


@pytest.mark.parametrize("destination", ["a/b/c", "acme/x@v1", "../x", ""])
def test_an_invalid_destination_is_refused(registry, destination):
    with pytest.raises(InputError):
        registry.push("legal", destination)
