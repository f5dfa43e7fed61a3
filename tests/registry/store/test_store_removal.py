"""Removing and restoring versions: tombstones, aliases that are in the way, numbers that are never used again."""

import errno
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.domains.errors import ConflictError, InputError, NotFoundError, StorageFullError
from lorary.registry.store.store import Store

FILES = {"README.md": (b"# legal\n", "card")}
HELD_BACK = {"gate": {"holds": False}}


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store", {})


@pytest.fixture
def three(store, draft):
    """A store with three versions of `legal`."""
    for _ in range(3):
        store.commit(draft, FILES)
    return store


def test_a_removed_version_is_gone_and_its_files_stay(three):
    manifest = three.manifest("legal", 2)

    assert three.remove("legal@2") == manifest

    assert three.versions("legal") == [1, 3]
    assert list(three.removed("legal")) == [2]
    assert three.history("legal")[1] == manifest
    assert three.read(manifest, "README.md") == b"# legal\n"
    with pytest.raises(NotFoundError, match="legal@2 was removed") as caught:
        three.manifest("legal", "2")
    assert caught.value.fix == "Bring it back: registry restore legal@2"


def test_the_number_of_a_removed_version_is_never_used_again(three, draft):
    three.remove("legal")

    assert three.commit(draft, FILES).version == 4
    for version in (1, 2, 4):
        three.remove(f"legal@{version}")
    assert three.commit(draft, FILES, first_only=True).version == 5


def test_latest_moves_to_the_newest_that_is_not_held_back(three, draft):
    three.commit(replace(draft, evaluation=HELD_BACK), FILES, alias=None)
    assert three.aliases("legal") == {"latest": 3}

    three.remove("legal@latest")

    assert three.aliases("legal") == {"latest": 2}
    assert three.manifest("legal").version == 2


def test_latest_moves_to_a_version_held_back_where_there_is_no_other(store, draft):
    store.commit(draft, FILES)
    store.commit(replace(draft, evaluation=HELD_BACK), FILES, alias=None)

    store.remove("legal@1")

    assert store.manifest("legal").version == 2


def test_latest_stays_where_another_version_is_removed(three):
    three.remove("legal@1")

    assert three.aliases("legal") == {"latest": 3}


def test_a_version_that_an_alias_means_is_not_removed(three):
    three.set_alias("legal", "production", 2)

    with pytest.raises(ConflictError, match="legal@2 cannot be removed") as caught:
        three.remove("legal@production")

    assert caught.value.exit_code == 4
    assert "registry alias legal production --remove" in str(caught.value.fix)
    assert three.versions("legal") == [1, 2, 3]
    three.drop_alias("legal", "production")
    three.remove("legal@2")
    assert three.versions("legal") == [1, 3]


def test_an_alias_of_a_removed_version_says_so(three):
    three.remove("legal@2")
    (three.path / "domains" / "legal" / "aliases" / "production").write_bytes(b"2\n")  # as of a colleague just now

    with pytest.raises(NotFoundError, match="legal@2 was removed"):
        three.manifest("legal", "production")
    with pytest.raises(NotFoundError, match="legal@2 was removed"):
        three.set_alias("legal", "other", 2)


def test_removing_twice_or_what_was_never_there_is_not_found(three):
    three.remove("legal@2")

    for version in (2, 4):
        with pytest.raises(NotFoundError):
            three.remove(f"legal@{version}")
    with pytest.raises(NotFoundError):
        three.remove("legacy")


def test_a_restored_version_is_as_it_was(three):
    manifest = three.manifest("legal", 3)
    three.remove("legal@3")

    three.restore("legal@3")

    assert three.manifest("legal", 3) == manifest
    assert three.removed("legal") == {}
    assert three.aliases("legal") == {"latest": 2}  # where it was moved to


def test_a_domain_without_any_version_is_unknown_until_one_is_restored(three):
    for version in (1, 2, 3):
        three.remove(f"legal@{version}")

    assert three.domains() == []
    assert three.versions("legal") == []
    assert len(three.history("legal")) == 3
    with pytest.raises(NotFoundError, match="legal@3 was removed"):
        three.manifest("legal")

    three.restore("legal@1")
    assert three.domains() == ["legal"]
    assert three.manifest("legal").version == 1


def test_latest_points_to_the_only_version_that_was_restored_and_stays_there(three):
    for version in (3, 2, 1):
        three.remove(f"legal@{version}")

    three.restore("legal@1")
    assert three.aliases("legal") == {"latest": 1}

    three.restore("legal@3")
    assert three.aliases("legal") == {"latest": 1}
    assert three.manifest("legal").version == 1


def test_latest_points_to_a_version_held_back_where_all_others_are_removed(three, draft):
    for version in (3, 2, 1):
        three.remove(f"legal@{version}")

    three.commit(replace(draft, evaluation=HELD_BACK), FILES, alias=None)

    assert three.aliases("legal") == {"latest": 4}


def test_restoring_what_is_not_removed_is_a_conflict(three):
    with pytest.raises(ConflictError):
        three.restore("legal@1")
    with pytest.raises(NotFoundError):
        three.restore("legal@4")


def test_restoring_a_name_alone_restores_what_was_removed_last_even_in_the_same_second(three):
    for version in (3, 1, 2):
        three.remove(f"legal@{version}")

    assert [three.restore("legal").version for _ in range(3)] == [2, 1, 3]
    with pytest.raises(NotFoundError, match="No version of 'legal' is removed"):
        three.restore("legal")


def test_an_alias_cannot_be_restored(three):
    three.remove("legal@3")

    with pytest.raises(InputError, match="names an alias"):
        three.restore("legal@latest")


def test_the_knowledge_preservation_bank_cannot_be_removed(store, draft):
    store.commit(replace(draft, name="general", role="preservation"), FILES)

    with pytest.raises(ConflictError, match="The KP bank cannot be removed"):
        store.remove("general")


def test_latest_is_never_dropped_and_other_aliases_only_once(three):
    three.set_alias("legal", "production", 2)
    three.drop_alias("legal", "production")

    assert three.aliases("legal") == {"latest": 3}
    with pytest.raises(NotFoundError):
        three.drop_alias("legal", "production")
    with pytest.raises(InputError):
        three.drop_alias("legal", "latest")


@pytest.mark.parametrize("function", ["write", "fsync", "link"])
def test_a_full_disk_removes_nothing(three, monkeypatch, function):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(StorageFullError):
            three.remove("legal@3")

    assert three.versions("legal") == [1, 2, 3]
    assert three.manifest("legal").version == 3


@pytest.mark.parametrize("when", ["before the alias moved", "after it moved"])
def test_a_process_that_ends_while_removing_leaves_a_store_that_works(three, draft, monkeypatch, when):
    def end(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorary.registry.store.seals.Seals.write", end)
        if when == "before the alias moved":
            with pytest.raises(KeyboardInterrupt):
                three.remove("legal@3")
    if when == "after it moved":
        three.remove("legal@3")

    assert three.versions("legal") == [1, 2]
    assert three.manifest("legal").version == 2
    three.restore("legal@3")
    assert three.versions("legal") == [1, 2, 3]
    assert three.commit(draft, FILES).version == 4


STEPS = st.lists(
    st.tuples(st.sampled_from(["commit", "hold back", "remove", "restore"]), st.integers(1, 6)), max_size=14
)


@settings(max_examples=30)
@given(steps=STEPS)
def test_any_history_keeps_numbers_manifests_and_latest_in_order(steps, draft, tmp_path_factory):
    store, digests, removed = Store.create(tmp_path_factory.mktemp("history") / "store", {}), {}, set()

    for number, (step, version) in enumerate(steps):
        is_there = version in digests and version not in removed
        if step in ("commit", "hold back"):
            changed = replace(draft, description=str(number), evaluation=HELD_BACK if step == "hold back" else {})
            made = store.commit(changed, FILES, alias="latest" if step == "commit" else None)
            assert made.version == len(digests) + 1
            digests[made.version] = made.digest
        elif step == "remove" and is_there:
            assert store.remove(f"legal@{version}").version == version
            removed.add(version)
        elif step == "restore" and version in removed:
            store.restore(f"legal@{version}")
            removed.discard(version)

        assert store.versions("legal") == sorted(digests.keys() - removed)
        assert set(store.removed("legal")) == removed
        if digests:
            assert {m.version: m.digest for m in store.history("legal")} == digests
        if digests.keys() - removed:
            assert store.manifest("legal").version in digests.keys() - removed
