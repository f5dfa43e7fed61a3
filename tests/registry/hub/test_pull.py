"""Pulling light packs from a local Hub server through the unmodified client."""

import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from lorary.domains.errors import (
    ConflictError,
    IncompatibleError,
    InputError,
    IntegrityError,
    LoraryError,
)
from lorary.registry.hub.origins import origins_of
from lorary.registry.store.blobs import sha256_of

REPO = "acme/lorary-legal"
LARGE = "adapter_model.safetensors"


def state(registry):
    """The bytes of every file of the store."""
    files = (path for path in registry.store.path.rglob("*") if path.is_file())
    return {str(path.relative_to(registry.store.path)): path.read_bytes() for path in files}


def edit_on_hub(path, data, **more):
    HfApi().create_commit(REPO, [CommitOperationAdd(path, data)], commit_message="edited", **more)


def test_a_pulled_pack_is_byte_for_byte_what_was_pushed(ours, theirs):
    done = ours.pull(REPO)

    pack = theirs.show("legal")
    assert (done.is_new, done.is_latest, done.is_checked, done.preservation) == (True, True, True, "same")
    assert ours.show("legal").to_json() == pack.to_json()
    for file in pack.files:
        assert ours.store.read(ours.show("legal"), file.path) == theirs.store.read(pack, file.path)


def test_a_second_pull_fetches_and_stores_nothing(ours, local_hub):
    ours.pull(REPO)
    before, asked = state(ours), len(local_hub.requests)

    again = ours.pull(REPO)

    assert (again.is_new, again.fetched) == (False, ())
    assert state(ours) == before
    assert not [path for _, _, path, _ in local_hub.requests[asked:] if path.endswith(".safetensors")]


@pytest.mark.parametrize("source", [f"hf://{REPO}@v1", f"{REPO}@v1"])
def test_a_tag_names_a_version(ours, theirs, source):
    assert ours.pull(source).manifest.digest == theirs.show("legal@1").digest


def test_a_revision_may_be_given_separately_but_not_twice(ours):
    assert ours.pull(REPO, revision="v1").manifest.version == 1
    with pytest.raises(InputError, match="revision is given twice"):
        ours.pull(f"{REPO}@v1", revision="v2")


def test_an_update_becomes_the_next_version_and_the_latest(ours):
    ours.pull(f"{REPO}@v1")

    done = ours.pull(REPO)

    assert (done.manifest.version, done.is_latest) == (2, True)
    assert ours.store.versions("legal") == [1, 2]
    assert ours.pull(f"{REPO}@v1").is_latest is False


def test_an_older_version_does_not_become_the_latest(ours):
    ours.pull(REPO)

    done = ours.pull(f"{REPO}@v1")

    assert (done.manifest.version, done.is_latest) == (1, False)
    assert ours.show("legal").version == 2


def test_files_that_the_store_has_are_not_fetched(ours, theirs, local_hub):
    large = [file for file in theirs.show("legal").files if file.path.endswith(".safetensors")]
    for file in large[1:]:
        ours.store.blobs.put(theirs.store.blobs.get(file.sha256))

    fetched = ours.pull(REPO).fetched

    assert [file for file in fetched if file.path.endswith(".safetensors")] == large[:1]


def test_a_pull_restores_a_missing_blob(ours):
    pack = ours.pull(REPO).manifest
    path = ours.store.blobs.path(pack.file(LARGE).sha256)
    path.unlink()

    again = ours.pull(REPO)

    assert (again.is_new, [file.path for file in again.fetched]) == (False, [LARGE])
    ours.store.verify(pack)


def test_a_pull_under_another_name_is_another_domain(ours, theirs):
    done = ours.pull(REPO, name="law")

    assert ours.store.domains() == ["general", "law"]
    assert replace(ours.show("law"), name="legal").digest == theirs.show("legal").digest
    assert ours.pull(REPO, name="law").is_new is False
    assert origins_of(ours.store, done.manifest) == (done.origin,)


def test_a_local_domain_of_the_same_name_is_a_conflict(ours, light_pack):
    light_pack(ours, text="mine")

    with pytest.raises(ConflictError) as raised:
        ours.pull(REPO)

    assert raised.value.fix == f"pull it under another name: registry pull {REPO} --as legal-2"
    assert ours.store.versions("legal") == [1]


def test_the_publisher_pulls_a_version_that_someone_else_pushed(theirs, ours, light_pack):
    ours.pull(REPO)
    light_pack(ours, text="three")
    ours.push("legal", REPO)

    done = theirs.pull(REPO)

    assert (done.manifest.version, done.is_latest) == (3, True)


# --- bases and KP banks ---


def test_a_pack_for_another_base_is_refused_with_both_values(theirs, light_store):
    other = light_store("other")
    other.store.record.settings["base"]["weights"] = sha256_of(b"other weights")

    with pytest.raises(IncompatibleError) as raised:
        other.pull(REPO)

    assert theirs.base_record.weights in str(raised.value.cause)
    assert sha256_of(b"other weights") in str(raised.value.cause)
    assert other.store.domains() == ["general"]


def test_a_pack_trained_over_another_kp_bank_is_reported(theirs, light_store):
    other = light_store("other")
    bank = other.store.manifest("general")
    shutil.rmtree(other.store.path / "domains" / "general")
    other.store.commit(replace(bank, version=0, files=()), {"router/router.json": (b"another KP", "router")})

    assert other.pull(REPO).preservation == "other"
    theirs.push("general", "acme")
    banked = other.pull("acme/lorary-general")
    assert (banked.manifest.version, banked.is_latest) == (2, False)
    assert other.pull(REPO).preservation == "same"
    assert other.show("general").version == 1


def test_a_kp_bank_is_stored_as_general_only(ours, theirs):
    theirs.push("general", "acme")

    with pytest.raises(InputError, match="cannot be stored as the domain 'law'"):
        ours.pull("acme/lorary-general", name="law")
    with pytest.raises(InputError, match="cannot be stored as the domain 'general'"):
        ours.pull(REPO, name="general")
    assert ours.pull("acme/lorary-general").is_new is False


# --- moved tags, rewritten versions, wrong bytes ---


def test_a_moved_tag_is_refused(ours, theirs, local_hub):
    ours.pull(f"{REPO}@v1")
    refs = local_hub.repos.all[REPO].refs
    refs["tags/v1"] = refs["tags/v2"]

    with pytest.raises(IntegrityError, match="tag v1 of acme/lorary-legal was moved"):
        ours.pull(f"{REPO}@v1")


def test_a_rewritten_version_is_refused(ours, theirs, local_hub, light_store, light_pack):
    ours.pull(f"{REPO}@v1")
    forger = light_store("forger")
    light_pack(forger, text="forged")
    forger.push("legal", "alice")
    refs = local_hub.repos.all
    commit = refs["alice/lorary-legal"].commits[refs["alice/lorary-legal"].refs["main"]]
    refs[REPO].commits[commit.id] = commit
    refs[REPO].refs["tags/v1"] = commit.id

    with pytest.raises(IntegrityError, match="Version 1 of acme/lorary-legal was changed") as raised:
        ours.pull(f"{REPO}@v1")

    assert ours.store.versions("legal") == [1]
    assert commit.id in str(raised.value.fix)
    assert ours.pull(f"{REPO}@{commit.id}").is_new  # naming the commit is allowed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: [CommitOperationDelete(LARGE)], "is missing"),
        (lambda files: [CommitOperationAdd(LARGE, b"x")], "has 1 bytes on the Hub"),
        (lambda files: [CommitOperationAdd(LARGE, bytes(files[LARGE]))], "in the manifest"),
    ],
)
def test_a_repository_that_differs_from_its_manifest_is_refused_before_fetching(ours, theirs, local_hub, change, said):
    sizes = {file.path: file.size for file in theirs.show("legal").files}
    HfApi().create_commit(REPO, change(sizes), commit_message="odd")
    asked = len(local_hub.requests)

    with pytest.raises(IntegrityError) as raised:
        ours.pull(REPO)

    assert said in str(raised.value.cause)
    assert not [path for _, _, path, _ in local_hub.requests[asked:] if path.endswith(".safetensors")]
    assert ours.store.domains() == ["general"]


def test_a_changed_small_file_is_refused(ours, theirs):
    path = "experts/e0/adapter_config.json"
    file = theirs.show("legal").file(path)
    ours.store.blobs.path(file.sha256).unlink()  # the KP bank shares it, so it would not be fetched
    edit_on_hub(path, b"x" * file.size)

    with pytest.raises(IntegrityError, match=f"{path} of acme/lorary-legal"):
        ours.pull(REPO)
    assert ours.store.domains() == ["general"]


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"schema": "lorary.pack/1"}', b"\xff", b'{"a": 1, "a": 2}', b"x" * 5_000_000]
)
def test_a_malformed_manifest_is_refused(ours, data):
    edit_on_hub("lorary.json", data)

    with pytest.raises(IntegrityError):
        ours.pull(REPO)


def test_a_manifest_of_a_newer_schema_is_refused(ours, theirs):
    manifest = json.loads(theirs.show("legal").to_json()) | {"schema": "lorary.pack/2"}
    edit_on_hub("lorary.json", json.dumps(manifest).encode())

    with pytest.raises(IncompatibleError):
        ours.pull(REPO)


def test_wrong_bytes_of_the_right_size_are_downloaded_again(ours, theirs, local_hub):
    local_hub.fault("GET /[0-9a-f]{64}", "wrong", 7)
    local_hub.fault("GET .*/resolve/.*/lorary.json", "wrong", 70)

    assert ours.pull(REPO).manifest.digest == theirs.show("legal").digest


@pytest.mark.parametrize("kind", ["wrong", "short"])
def test_bytes_that_stay_wrong_are_an_error_and_nothing_is_stored(ours, local_hub, kind):
    local_hub.fault("GET /[0-9a-f]{64}", kind, 7, times=99)

    with pytest.raises(LoraryError) as raised:
        ours.pull(REPO)

    assert raised.value.exit_code == 5
    assert ours.store.domains() == ["general"]
    local_hub.faults.clear()
    assert ours.pull(REPO).is_new
