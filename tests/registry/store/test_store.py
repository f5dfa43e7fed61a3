import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lorary.domains.errors import (
    ConflictError,
    IncompatibleError,
    InputError,
    IntegrityError,
    NotFoundError,
    StorageFullError,
)
from lorary.registry.store.seals import write_sealed
from lorary.registry.store.store import Store, locate_store

FILES = {"README.md": (b"# legal\n", "card"), "experts/e0/adapter_model.safetensors": (b"tensors", "expert")}


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store", {"base": "pocket"})


def blob_of(store, manifest, path):
    return store.blobs.path(manifest.file(path).sha256)


def damage(path, data):
    path.chmod(0o644)
    path.write_bytes(data)


def test_created_store_opens_with_its_settings(store):
    again = Store.open(store.path)

    assert again.settings == {"base": "pocket"}
    assert again.record == store.record
    assert again.runs.is_dir()
    assert again.cache.is_dir()
    assert (store.path / "ballast").stat().st_size == 64 * 1024


def test_two_stores_have_different_ids(tmp_path):
    assert Store.create(tmp_path / "a", {}).record.id != Store.create(tmp_path / "b", {}).record.id


def test_changing_the_settings_changes_nothing(store):
    store.settings["base"] = "other"

    assert store.settings == {"base": "pocket"}


def test_second_create_is_a_conflict_and_keeps_the_first(store):
    with pytest.raises(ConflictError):
        Store.create(store.path, {})

    assert Store.open(store.path).settings == {"base": "pocket"}


def test_store_on_a_file_is_a_conflict(tmp_path):
    (tmp_path / "store").write_bytes(b"")

    with pytest.raises(ConflictError):
        Store.create(tmp_path / "store", {})


def test_create_that_was_cut_short_can_be_repeated(store):
    (store.path / "store.json").unlink()

    assert Store.create(store.path, {"base": "b"}).settings == {"base": "b"}


@pytest.mark.parametrize("place", ["nothing", "folder", "file"])
def test_open_without_a_store_says_how_to_make_one(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(NotFoundError) as caught:
        Store.open(tmp_path / place)

    assert "registry init" in str(caught.value.fix)


def test_store_of_a_newer_program_is_refused(store):
    write_sealed(store.path / "store.json", (store.path / "store.json").read_bytes().replace(b"store/1", b"store/2"))

    with pytest.raises(IncompatibleError):
        Store.open(store.path)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schema": "lorary.store/1"}'])
def test_damaged_store_file_is_found(store, data):
    damage(store.path / "store.json", data)

    with pytest.raises(IntegrityError, match="store.json"):
        Store.open(store.path)


def test_committed_version_reads_back(store, draft):
    manifest = store.commit(replace(draft, version=99), FILES)

    assert manifest.version == 1
    assert store.manifest("legal") == manifest
    assert [(file.path, file.size, file.kind) for file in manifest.files] == [
        ("README.md", 8, "card"),
        ("experts/e0/adapter_model.safetensors", 7, "expert"),
    ]
    assert store.read(manifest, "README.md") == b"# legal\n"
    store.verify(manifest)
    assert store.domains() == ["legal"]
    assert store.aliases("legal") == {"latest": 1}


def test_versions_count_up_and_stay_as_they_were(store, draft):
    first = store.commit(draft, FILES)
    second = store.commit(draft, {"README.md": (b"new", "card")})

    assert store.versions("legal") == [1, 2]
    assert store.manifest("legal", 1) == first
    assert store.manifest("legal", "2") == store.manifest("legal") == second


def test_versions_are_ordered_as_numbers(store, draft):
    for _ in range(11):
        store.commit(draft, {})

    assert store.versions("legal") == list(range(1, 12))
    assert store.manifest("legal").version == 11


def test_first_only_refuses_a_domain_that_is_there(store, draft):
    store.commit(draft, FILES, first_only=True)

    with pytest.raises(ConflictError, match="'legal' is there already"):
        store.commit(draft, FILES, first_only=True)

    assert store.versions("legal") == [1]


def test_version_held_back_leaves_latest_where_it_was(store, draft):
    store.commit(draft, FILES)

    held_back = store.commit(draft, FILES, alias=None)

    assert held_back.version == 2
    assert store.manifest("legal").version == 1


def test_other_alias_can_move_instead(store, draft):
    store.commit(draft, FILES)
    store.commit(draft, FILES, alias="candidate")

    assert store.aliases("legal") == {"candidate": 2, "latest": 1}


def test_bad_alias_is_refused_before_anything_is_stored(store, draft):
    with pytest.raises(InputError):
        store.commit(draft, FILES, alias="3")

    assert store.domains() == []
    assert list(store.blobs.all()) == []


def test_alias_moves_back_and_the_next_commit_takes_latest_again(store, draft):
    for _ in range(3):
        store.commit(draft, FILES)

    store.set_alias("legal", "latest", 1)
    assert store.manifest("legal").version == 1

    store.commit(draft, FILES)
    assert store.manifest("legal").version == 4


def test_alias_of_a_version_that_is_not_there_is_refused(store, draft):
    store.commit(draft, FILES)

    with pytest.raises(NotFoundError):
        store.set_alias("legal", "production", 2)


def test_domain_whose_process_ended_before_the_alias_still_loads(store, draft):
    store.commit(draft, FILES)
    (store.path / "domains" / "legal" / "aliases" / "latest").unlink()

    assert store.manifest("legal").version == 1


@pytest.mark.parametrize("data", [b"", b"x\n", b"1", b"01\n", b"1\n2\n"])
def test_damaged_alias_is_found_and_the_next_commit_repairs_it(store, draft, data):
    store.commit(draft, FILES)
    (store.path / "domains" / "legal" / "aliases" / "latest").write_bytes(data)

    with pytest.raises(IntegrityError, match="latest"):
        store.manifest("legal")
    assert store.manifest("legal", 1).version == 1

    store.commit(draft, FILES)
    assert store.manifest("legal").version == 2


def test_unknown_domain_lists_the_known_and_guesses(store, draft):
    store.commit(draft, FILES)
    store.commit(replace(draft, name="medicine"), FILES)

    with pytest.raises(NotFoundError) as caught:
        store.manifest("leagl")

    assert "'leagl'" in caught.value.message
    assert "legal, medicine" in str(caught.value.cause)
    assert caught.value.fix == "Did you mean legal?"


@pytest.mark.parametrize("selector", [2, 0, -1, "2", "prodction"])
def test_unknown_version_lists_the_known(store, draft, selector):
    store.commit(draft, FILES)
    store.set_alias("legal", "production", 1)

    with pytest.raises(NotFoundError) as caught:
        store.manifest("legal", selector)

    assert "Known versions: 1." in str(caught.value.cause)
    assert "production = 1" in str(caught.value.cause)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["../legal", "", "Legal", "latest"])
def test_name_that_is_no_name_is_refused(store, name):
    with pytest.raises(InputError):
        store.manifest(name)
    with pytest.raises(InputError):
        store.versions(name)


def test_folders_without_a_version_and_other_files_are_no_domains(store, draft):
    store.commit(draft, FILES)
    (store.path / "domains" / "empty").mkdir()
    (store.path / "domains" / "legal" / ".tmp-12").write_bytes(b"")
    (store.path / "domains" / "legal" / "02.json").write_bytes(b"")
    (store.path / "domains" / ".DS_Store").write_bytes(b"")

    assert store.domains() == ["legal"]
    assert store.versions("legal") == [1]
    assert store.versions("empty") == []


def test_manifest_under_another_name_is_found(store, draft):
    store.commit(draft, FILES)
    folder = store.path / "domains" / "legal"
    (folder / "2.json").write_bytes((folder / "1.json").read_bytes())

    with pytest.raises(IntegrityError, match="another pack"):
        store.manifest("legal", 2)


@pytest.mark.parametrize("data", [b"", b"tensor", b"tensorz", None])
def test_verify_names_every_damaged_file(store, draft, data):
    manifest = store.commit(draft, FILES)
    path = blob_of(store, manifest, "experts/e0/adapter_model.safetensors")
    damage(path, data) if data is not None else path.unlink()

    with pytest.raises(IntegrityError, match="1 of 2 files") as caught:
        store.verify(manifest)

    assert "experts/e0/adapter_model.safetensors" in str(caught.value.cause)
    assert "README.md" not in str(caught.value.cause)
    with pytest.raises(IntegrityError):
        store.read(manifest, "experts/e0/adapter_model.safetensors")


def test_commit_of_the_same_bytes_repairs_a_damaged_file(store, draft):
    first = store.commit(draft, FILES)
    damage(blob_of(store, first, "README.md"), b"# lega")

    store.commit(draft, FILES)

    store.verify(first)


def test_bad_path_is_refused_before_anything_is_stored(store, draft):
    with pytest.raises(ValueError, match="path cannot be"):
        store.commit(draft, {**FILES, "../x": (b"", "x")})

    assert list(store.blobs.all()) == []


def test_draft_that_could_not_be_read_again_is_not_stored(store, draft):
    with pytest.raises(IntegrityError, match="draft"):
        store.commit(replace(draft, description=7), FILES)

    assert store.domains() == []


def test_committed_manifest_equals_the_stored_one_in_type_too(store, draft):
    manifest = store.commit(replace(draft, train={"seeds": (1, 2)}), FILES)

    assert manifest == store.manifest("legal")


@pytest.mark.parametrize("function", ["write", "fsync", "link"])
@pytest.mark.parametrize("survivors", [0, 1, 2, 3])
def test_full_disk_stores_no_half_version(store, draft, monkeypatch, function, survivors):
    store.commit(draft, FILES)
    real, calls = getattr(os, function), []

    def full_after(*args, **kwargs):
        calls.append(args)
        if len(calls) > (0 if function == "link" else survivors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full_after)
        with pytest.raises(StorageFullError):
            store.commit(draft, {"README.md": (b"a", "card"), "x": (b"b", "x"), "y": (b"c", "x")})

    for version in store.versions("legal"):
        store.verify(store.manifest("legal", version))
    assert not [path for path in store.path.rglob(".tmp-*")]
    assert store.commit(draft, FILES).version == len(store.versions("legal"))


def test_a_damaged_alias_does_not_keep_a_version_from_being_committed(store, draft):
    store.commit(draft, FILES)
    (store.path / "domains" / "legal" / "aliases" / "production").write_bytes(b"two\n")

    assert store.commit(draft, FILES, alias=None).version == 2
    assert store.versions("legal") == [1, 2]


# --- where a store is ---


def test_what_is_asked_comes_first_then_environment_then_parents_then_home(tmp_path):
    project = tmp_path / "project"
    (project / ".lorary").mkdir(parents=True)
    (project / "deep" / "er").mkdir(parents=True)
    environ = {"LORARY_STORE": "/env", "XDG_DATA_HOME": "/xdg", "HOME": "/home/me"}
    without = {key: value for key, value in environ.items() if key != "LORARY_STORE"}

    assert locate_store("/asked", environ, project) == Path("/asked")
    assert locate_store("asked", environ, project) == project / "asked"
    assert locate_store(None, environ, project) == Path("/env")
    assert locate_store(None, without, project / "deep" / "er") == project / ".lorary"
    assert locate_store(None, without, tmp_path) == Path("/xdg/lorary")
    assert locate_store(None, {"HOME": "/home/me"}, tmp_path) == Path("/home/me/.local/share/lorary")
    assert locate_store(None, {"HOME": "/home/me", "XDG_DATA_HOME": "rel"}, tmp_path).is_relative_to("/home/me")


def test_it_passes_over_empty_variables_and_files_named_lorary(tmp_path):
    (tmp_path / ".lorary").write_bytes(b"")
    environ = {"LORARY_STORE": "", "XDG_DATA_HOME": "", "HOME": "/home/me"}

    assert locate_store("", environ, tmp_path) == Path("/home/me/.local/share/lorary")
