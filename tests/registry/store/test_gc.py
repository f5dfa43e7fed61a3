"""gc: deletes what nothing needs, spares what is young, and never takes what a writer is about to need."""

import errno
import fcntl
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import ConflictError, IntegrityError, LoraryError, NotFoundError, StorageFullError
from lorary.registry.store.files import folder_lock
from lorary.registry.store.gc import GRACE_S, collect_garbage
from lorary.registry.store.store import Store
from lorary.registry.store.strict_json import canonical_json
from lorary.registry.store.versions import DomainFolder

DAY = 24 * 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", {})


def commit(store: Store, draft: Any, *contents: bytes) -> Any:
    return store.commit(draft, {f"f{i}": (data, "expert") for i, data in enumerate(contents)})


def age(store: Store, seconds: float = 2 * DAY) -> None:
    """Everything in the store becomes that much older."""
    then = time.time() - seconds
    for path in store.path.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def tombstone_since(store: Store, name: str, version: int, moment: str) -> None:
    DomainFolder(store.path, name).seals.write(f"removed/{version}", f"{moment}\n".encode())


def test_blobs_of_versions_stay_and_all_others_go(store: Store, draft: Any) -> None:
    manifest = commit(store, draft, b"one", b"two")
    stray = store.blobs.put(b"of a refused pull")
    age(store)

    found = collect_garbage(store)

    assert found.blobs == (stray,)
    assert found.bytes == len(b"of a refused pull")
    assert list(store.blobs.all()) == sorted(file.sha256 for file in manifest.files)
    store.verify(manifest)
    assert collect_garbage(store).blobs == ()


def test_what_is_young_is_spared_because_its_manifest_may_be_coming(store: Store) -> None:
    young = store.blobs.put(b"young")

    found = collect_garbage(store)

    assert (found.blobs, found.young) == ((), 1)
    assert young in store.blobs
    assert collect_garbage(store, grace_s=-1).blobs == (young,)


def test_a_dry_run_deletes_nothing_and_says_the_same(store: Store, draft: Any) -> None:
    stray = store.blobs.put(b"stray")
    (store.path / "blobs" / "sha256" / ".tmp-1").write_bytes(b"x")
    age(store)
    before = sorted(store.path.rglob("*"))

    planned = collect_garbage(store, dry_run=True)

    assert sorted(store.path.rglob("*")) == before
    done = collect_garbage(store)
    assert (planned.blobs, planned.temporary, planned.bytes) == (done.blobs, done.temporary, done.bytes)
    assert planned.blobs == (stray,)
    assert planned.is_dry


def test_a_removed_version_keeps_its_files_through_the_grace_period(store: Store, draft: Any) -> None:
    commit(store, draft, b"shared", b"first")
    second = commit(store, draft, b"shared", b"second")
    store.remove("legal@2")
    age(store)

    assert collect_garbage(store).blobs == ()
    store.restore("legal@2")
    store.verify(second)

    store.remove("legal@2")
    tombstone_since(store, "legal", 2, "2020-01-01T00:00:00+00:00")
    age(store)
    assert len(collect_garbage(store).blobs) == 1
    store.verify(store.manifest("legal", 1))
    with pytest.raises(NotFoundError, match="legal@2 cannot be restored") as caught:
        store.restore("legal@2")
    assert "gc has since deleted 1 of its 2 files" in str(caught.value.cause)


def test_a_version_that_was_just_restored_is_not_taken_apart(store: Store, draft: Any) -> None:
    manifest = commit(store, draft, b"one")
    store.remove("legal@1")
    tombstone_since(store, "legal", 1, "2020-01-01T00:00:00+00:00")
    age(store)
    store.restore("legal@1")

    assert collect_garbage(store).blobs == ()
    store.verify(manifest)


def test_a_tombstone_that_cannot_be_read_deletes_nothing(store: Store, draft: Any) -> None:
    commit(store, draft, b"one")
    store.remove("legal@1")
    tombstone_since(store, "legal", 1, "whenever")
    age(store)

    assert collect_garbage(store).blobs == ()


def test_no_blob_is_deleted_while_a_manifest_cannot_be_read(store: Store, draft: Any) -> None:
    commit(store, draft, b"one")
    stray = store.blobs.put(b"stray")
    age(store)
    (store.path / "domains" / "legal" / "1.json").write_bytes(b"{")

    found = collect_garbage(store)

    assert (found.unreadable, found.blobs) == (("legal@1",), ())
    assert stray in store.blobs


def test_a_damaged_tombstone_keeps_its_blobs(store: Store, draft: Any) -> None:
    commit(store, draft, b"one")
    store.remove("legal@1")
    age(store)
    (store.path / "domains" / "legal" / "removed" / "1").write_bytes(b"2006-01-02T03:04:05+00:00\n")

    assert collect_garbage(store).blobs == ()


def test_temporary_files_go_and_young_ones_stay(store: Store, draft: Any) -> None:
    commit(store, draft, b"one")
    folders = [store.path, store.blobs.folder, store.path / "domains" / "legal", store.runs, store.cache]
    old = [folder / ".tmp-old" for folder in folders]
    for path in old:
        path.write_bytes(b"x")
    age(store)
    (store.path / ".tmp-new").write_bytes(b"x")

    assert sorted(collect_garbage(store).temporary) == sorted(old)
    assert [path.name for path in store.path.rglob(".tmp-*")] == [".tmp-new"]


@pytest.mark.parametrize(
    ("state", "is_stored", "goes"), [("done", False, True), ("running", True, True), ("running", False, False)]
)
def test_checkpoints_of_finished_runs_go_and_the_record_of_the_run_stays(
    store: Store, draft: Any, state: str, is_stored: bool, goes: bool
) -> None:
    run = store.runs / "legal-1"
    (run / "checkpoint-4").mkdir(parents=True)
    (run / "checkpoint-4" / "model.safetensors").write_bytes(b"12345")
    (run / "run.json").write_bytes(canonical_json({"state": state}))
    commit(store, replace(draft, train=draft.train | {"run": "legal-1" if is_stored else "another"}), b"one")
    age(store)
    os.utime(run / "checkpoint-4", (0, 0))

    found = collect_garbage(store)

    assert (run / "run.json").exists()
    assert (run / "checkpoint-4").exists() != goes
    assert found.bytes == (5 if goes else 0)


def test_checkpoints_of_a_repeated_run_stay_where_its_first_version_was_removed(store: Store, draft: Any) -> None:
    checkpoint = store.runs / "legal-1" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "run.json").write_bytes(canonical_json({"state": "running"}))
    commit(store, replace(draft, train=draft.train | {"run": "legal-1"}), b"one")
    store.remove("legal@1")
    os.utime(checkpoint, (0, 0))

    assert collect_garbage(store).checkpoints == ()
    assert checkpoint.exists()


# --- writers at the same time ---


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses locks, as NFS may: only the order of what is done protects."""

    def refuse(*_arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_blob_that_a_writer_takes_up_while_gc_looks_is_moved_back(
    store: Store, draft: Any, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    store.blobs.put(b"same")
    age(store)
    committed = []

    def and_somebody_commits(path: Path, target: Path) -> None:
        if not committed:  # between gc's look and its first move
            committed.append(commit(store, draft, b"same"))
        os.replace(path, target)

    monkeypatch.setattr("lorary.registry.store.gc.move", and_somebody_commits)

    found = collect_garbage(store)

    assert (found.blobs, found.bytes) == ((), 0)
    store.verify(committed[0])


def test_a_blob_that_a_writer_puts_again_while_it_is_moved_aside_is_there(
    store: Store, draft: Any, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    store.blobs.put(b"same")
    age(store)
    committed = []

    def and_somebody_commits(path: Path, target: Path) -> None:
        os.replace(path, target)
        if not committed:
            committed.append(commit(store, draft, b"same"))

    monkeypatch.setattr("lorary.registry.store.gc.move", and_somebody_commits)
    collect_garbage(store)

    store.verify(committed[0])
    assert not os.listdir(store.blobs.folder.with_name("quarantine"))


def test_without_locks_a_commit_stores_again_what_a_gc_took_before_its_link(
    store: Store, draft: Any, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    real, collected = os.link, []

    def after_a_collection(*paths: Any) -> None:
        if not collected and str(paths[1]).endswith("1.json"):
            with monkeypatch.context() as only_blobs:  # a missing temporary file is refused, see below
                only_blobs.setattr("lorary.registry.store.gc._temporary_files", lambda _store: ())
                collected.extend(collect_garbage(store, grace_s=-2 * DAY).blobs)  # by a clock two days ahead
        real(*paths)

    monkeypatch.setattr(os, "link", after_a_collection)

    manifest = commit(store, draft, b"one", b"two")

    assert len(collected) == 2
    store.verify(manifest)


def test_without_locks_a_pull_is_not_acknowledged_where_a_gc_took_its_files(
    store: Store, draft: Any, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    manifest = commit(store, draft, b"one")
    real = os.link

    def after_a_collection(*paths: Any) -> None:
        if str(paths[1]).endswith("tax/1.json"):
            store.remove("legal@1")
            with monkeypatch.context() as only_blobs:
                only_blobs.setattr("lorary.registry.store.gc._temporary_files", lambda _store: ())
                collect_garbage(store, grace_s=-2 * DAY)
        real(*paths)

    monkeypatch.setattr(os, "link", after_a_collection)

    with pytest.raises(IntegrityError, match="not complete"):
        store.adopt(replace(manifest, name="tax"), alias="latest")


def test_without_locks_a_writer_whose_temporary_file_is_gone_is_refused_and_works_again(
    store: Store, draft: Any, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    real = os.link

    def after_a_collection(*paths: Any) -> None:
        collect_garbage(store, grace_s=-2 * DAY)
        real(*paths)

    with monkeypatch.context() as seam:
        seam.setattr(os, "link", after_a_collection)
        with pytest.raises(LoraryError, match="Cannot write"):
            commit(store, draft, b"one")

    assert store.domains() == []
    store.verify(commit(store, draft, b"one"))


def test_gc_waits_for_a_writer_that_has_stored_blobs_and_linked_no_manifest(store: Store) -> None:
    stray = store.blobs.put(b"about to be named")
    seen = []
    with ThreadPoolExecutor() as pool:
        with store.blobs.lease():
            done = pool.submit(collect_garbage, store, grace_s=-2 * DAY)
            time.sleep(0.1)
            seen.append((stray in store.blobs, done.done()))
        assert done.result().blobs == (stray,)

    assert seen == [(True, False)]


def test_a_hung_holder_of_a_lock_is_named(store: Store) -> None:
    script = (
        "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, 2); print(); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script, store.path], stdout=subprocess.PIPE) as hung:
        assert hung.stdout is not None
        hung.stdout.readline()
        with (
            pytest.raises(ConflictError, match="is locked by another process") as caught,
            folder_lock(store.path, timeout_s=0.1),
        ):
            pass
        hung.kill()

    assert f"process {hung.pid}: " in str(caught.value.cause)
    assert str(caught.value.fix).endswith(f"kill {hung.pid}")
    with folder_lock(store.path, timeout_s=0.1):  # it is free as soon as its holder has ended
        pass


def test_what_an_interrupted_gc_left_aside_is_put_back_or_deleted(store: Store, draft: Any) -> None:
    manifest = commit(store, draft, b"needed")
    aside = store.blobs.folder.with_name("quarantine")
    aside.mkdir()
    needed, stray = manifest.files[0].sha256, store.blobs.put(b"stray")
    for digest in (needed, stray):
        os.replace(store.blobs.path(digest), aside / digest.removeprefix("sha256:"))
    age(store)

    collect_garbage(store)

    store.verify(manifest)
    assert stray not in store.blobs
    assert not os.listdir(aside)


COMMITTER = """
import random, sys
from pathlib import Path
from lorary.registry.store.manifest import PackManifest
from lorary.registry.store.store import Store

store, draw = Store.open(sys.argv[1]), random.Random(int(sys.argv[3]))
draft = PackManifest.from_json(Path(sys.argv[2]).read_bytes(), source="draft")
for _ in range(int(sys.argv[4])):
    # from contents that come again after seconds, so that blobs are shared, left and taken up again
    store.commit(draft, {f"f{i}": (b"%d" % draw.randrange(2000), "expert") for i in range(3)})
    versions = store.versions("legal")
    if len(versions) > 3:
        try:
            store.remove(f"legal@{versions[0]}")
        except Exception as error:
            if type(error).__name__ != "NotFoundError":
                raise
"""


def race(store: Store, draft: Any, tmp_path: Path, *, commits: int, grace_s: float = 1.0) -> int:
    (tmp_path / "draft.json").write_bytes(draft.to_json())
    command = [sys.executable, "-c", COMMITTER, str(store.path), str(tmp_path / "draft.json")]
    writers = [subprocess.Popen([*command, str(seed), str(commits)]) for seed in range(3)]
    deleted = 0
    while any(writer.poll() is None for writer in writers):
        deleted += len(collect_garbage(store, grace_s=grace_s).blobs)
        time.sleep(random.random() / 50)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    time.sleep(1.1)
    deleted += len(collect_garbage(store, grace_s=1.0).blobs)
    for version in store.versions("legal"):
        store.verify(store.manifest("legal", version))
    named = {file.sha256 for version in store.versions("legal") for file in store.manifest("legal", version).files}
    assert set(store.blobs.all()) == named
    return deleted


@pytest.mark.parametrize("grace_s", [0, -2 * DAY], ids=["without grace", "by a clock two days ahead"])
def test_writers_lose_nothing_to_a_gc_beside_them(store: Store, draft: Any, tmp_path: Path, grace_s: float) -> None:
    race(store, draft, tmp_path, commits=10, grace_s=grace_s)


@pytest.mark.slow
def test_writers_lose_nothing_to_a_gc_beside_them_for_long(store: Store, draft: Any, tmp_path: Path) -> None:
    assert race(store, draft, tmp_path, commits=400)


# --- a full disk ---


def test_a_full_disk_is_cleaned_with_the_space_of_the_ballast(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = store.blobs.put(b"stray")
    age(store)
    ballast, real = store.path / "ballast", os.mkdir

    def only_without_ballast(path: Any, *arguments: Any, **more: Any) -> None:
        if ballast.exists():
            raise OSError(errno.ENOSPC, "full")
        real(path, *arguments, **more)

    monkeypatch.setattr(os, "mkdir", only_without_ballast)

    assert collect_garbage(store).blobs == (stray,)
    assert ballast.stat().st_size == 64 << 10


@pytest.mark.slow
def test_a_really_full_disk_takes_commits_again_after_remove_and_gc(draft: Any, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no right to mount here")
    try:
        store = Store.create(tmp_path / "store", {})
        filled, full = 0, 0
        for number in range(300):
            try:
                commit(store, draft, os.urandom(100_000) + b"%d" % number)
                filled += 1
            except StorageFullError:
                full += 1
                for version in store.versions("legal")[:-1]:
                    store.remove(f"legal@{version}")
                    collect_garbage(store, grace_s=-2)
        assert full > 10
        assert filled > 200
        store.verify(store.manifest("legal"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_grace_period_is_a_day() -> None:
    assert GRACE_S == DAY
