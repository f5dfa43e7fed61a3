"""What processes can do to a store: commit all at once, and be killed at any moment."""

import random
import signal
import subprocess
import sys
import time

import pytest

from lorary.registry.store.store import Store

COMMITTER = """
import os, sys
from pathlib import Path
from lorary.registry.store.manifest import PackManifest
from lorary.registry.store.store import Store

store = Store.open(sys.argv[1])
draft = PackManifest.from_json(Path(sys.argv[2]).read_bytes(), source="draft")
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    data = os.urandom(20_000)
    files = {"a": (data, "expert"), "b": (data[:9], "expert"), "same": (b"same", "card")}
    manifest = store.commit(draft, files)
    print(manifest.version, manifest.digest, flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store", {})


@pytest.fixture
def start_committer(store, draft, tmp_path):
    """Start a process that waits for a line and then commits; it ends with the test."""
    (tmp_path / "draft.json").write_bytes(draft.to_json())
    processes = []

    def start(commits):
        arguments = [sys.executable, "-c", COMMITTER, str(store.path), str(tmp_path / "draft.json"), str(commits)]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def acknowledged_in(output):
    """Version to digest, from the complete lines that a process has printed."""
    return {int(line.split()[0]): line.split()[1] for line in output.splitlines(keepends=True) if line.endswith("\n")}


def assert_is_sound(store, acknowledged):
    versions = store.versions("legal")
    assert versions == list(range(1, len(versions) + 1))
    for version in versions:
        manifest = store.manifest("legal", version)
        store.verify(manifest)
        assert acknowledged.get(version, manifest.digest) == manifest.digest
    assert acknowledged.keys() <= set(versions)


def test_eight_processes_get_contiguous_versions_and_none_is_lost(store, start_committer):
    processes = [start_committer(4) for _ in range(8)]

    for process in processes:
        go(process)
    outputs = [process.communicate(timeout=120)[0] for process in processes]

    acknowledged = [version for output in outputs for version in acknowledged_in(output)]
    assert sorted(acknowledged) == list(range(1, 33))
    assert_is_sound(
        store, {version: digest for output in outputs for version, digest in acknowledged_in(output).items()}
    )
    assert store.aliases("legal") == {"latest": 32}
    assert not list(store.path.rglob(".tmp-*"))


def kill_at_random_moments(store, start_committer, kills, seed):
    """Kill a committing process again and again, each time after 0 to 2 answers and a random part of one commit.

    Paced by what the process answers, because a fixed time would be before the first commit on a slow or busy disk.
    """
    acknowledged = {}
    moments = random.Random(seed)
    commit_s = 0.05  # until the first one is measured
    for _ in range(kills):
        process = start_committer(1000)
        answers_wanted = moments.randrange(3)
        started = time.perf_counter()
        go(process)
        output = "".join(process.stdout.readline() for _ in range(answers_wanted))
        if answers_wanted:
            commit_s = (time.perf_counter() - started) / answers_wanted
        time.sleep(moments.uniform(0, commit_s))
        process.send_signal(signal.SIGKILL)
        output += process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        assert len(acknowledged_in(output)) >= answers_wanted
        acknowledged |= acknowledged_in(output)
    assert_is_sound(store, acknowledged)
    return acknowledged


def test_acknowledged_versions_survive_being_killed(store, start_committer):
    acknowledged = kill_at_random_moments(store, start_committer, kills=30, seed=1)

    assert acknowledged
    assert store.manifest("legal").version >= max(acknowledged)


@pytest.mark.slow
def test_acknowledged_versions_survive_being_killed_hundreds_of_times(store, start_committer):
    assert kill_at_random_moments(store, start_committer, kills=300, seed=2)


REMOVER = """
import sys
from lorary.domains.errors import NotFoundError
from lorary.registry.store.store import Store

store = Store.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
while True:
    try:
        version = store.remove("legal@2").version
        print("removed", version, flush=True)
        store.restore("legal@2")
        print("restored", version, flush=True)
    except NotFoundError:
        store.restore("legal@2")
"""


def test_a_version_is_removed_or_not_whenever_the_process_is_killed(store, draft):
    for _ in range(2):
        store.commit(draft, {"a": (b"a", "expert")})
    manifest, moments = store.manifest("legal", 2), random.Random(3)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", REMOVER, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            go(process)
            answers = [process.stdout.readline() for _ in range(moments.randrange(1, 5))]
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            assert answers[-1]

        assert store.versions("legal") in ([1], [1, 2])
        assert store.history("legal")[1] == manifest
        assert store.manifest("legal").version in store.versions("legal")
        store.verify(manifest)
    assert store.commit(draft, {}).version == 3


def test_numbers_of_removed_versions_are_not_used_by_processes_that_commit_meanwhile(store, draft, start_committer):
    processes = [start_committer(6) for _ in range(4)]
    store.commit(draft, {"a": (b"a", "expert")})
    for process in processes:
        go(process)

    removed = {}
    while any(process.poll() is None for process in processes):
        version = store.versions("legal")[-1]
        removed[version] = store.manifest("legal", version).digest
        store.remove(f"legal@{version}")
        if not store.versions("legal"):
            store.restore("legal@1")
            del removed[1]

    outputs = [process.stdout.read() for process in processes]
    acknowledged = {v: digest for output in outputs for v, digest in acknowledged_in(output).items()}
    assert sorted(acknowledged) == list(range(2, 26))
    history = {manifest.version: manifest.digest for manifest in store.history("legal")}
    assert history.items() >= acknowledged.items()
    assert set(store.removed("legal")) == removed.keys()
