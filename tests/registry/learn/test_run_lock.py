"""One training of a domain at a time: the second is refused with who runs the first; a dead owner is no obstacle."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import ConflictError
from lorary.registry.learn.run_lock import Owner, only_training_of
from lorary.registry.store.store import Store
from lorary.registry.store.strict_json import canonical_json, record_to_json

OWNER = """
import sys, time
from lorary.registry.learn.run_lock import only_training_of
from lorary.registry.store.store import Store

with only_training_of(Store.open(sys.argv[1]), "legal"):
    print("training", flush=True)
    time.sleep(99)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", {})


@pytest.fixture
def trainer(store: Store) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which trains `legal`."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(store.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"training\n"
        yield process
        process.kill()


def record(store: Store) -> Path:
    return store.runs / "locks" / "legal.json"


def test_the_second_is_told_who_runs_since_when_until_the_first_is_dead(store: Store, trainer: Any) -> None:
    with (
        pytest.raises(ConflictError, match="legal is being trained already") as caught,
        only_training_of(store, "legal"),
    ):
        pass

    since = json.loads(record(store).read_bytes())["since"]
    assert f"process {trainer.pid} on {platform.node()} since {since}" in str(caught.value.cause)
    assert str(caught.value.fix).endswith(f"kill {trainer.pid}")
    with only_training_of(store, "tax"):  # another domain may be trained
        pass

    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert record(store).exists()
    with only_training_of(store, "legal"):
        assert json.loads(record(store).read_bytes())["process"] == os.getpid()
    assert not record(store).exists()


def test_a_thread_of_the_same_process_is_refused_as_well(store: Store) -> None:
    with only_training_of(store, "legal"), pytest.raises(ConflictError), only_training_of(store, "legal"):
        pass


def test_an_error_frees_the_domain(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), only_training_of(store, "legal"):
        raise ZeroDivisionError

    with only_training_of(store, "legal"):
        pass


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),  # without a lock, as where a file system has none: it is this very process
        ({"started": "1"}, False),  # its number belongs to another process by now
        ({"boot": "before"}, False),
        ({"process": 1 << 30}, False),
        ({"host": "elsewhere", "process": 1 << 30}, True),  # it cannot be asked
    ],
)
def test_an_owner_without_a_lock_is_judged_by_its_record(store: Store, changes: Any, *, is_refused: bool) -> None:
    record(store).parent.mkdir()
    record(store).write_bytes(canonical_json(record_to_json(Owner.here()) | changes))

    if is_refused:
        with pytest.raises(ConflictError) as caught, only_training_of(store, "legal"):
            pass
        assert ("rm " in str(caught.value.fix)) == ("host" in changes)
    else:
        with only_training_of(store, "legal"):
            pass


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_record_without_a_lock_is_no_obstacle(store: Store, data: bytes) -> None:
    record(store).parent.mkdir()
    record(store).write_bytes(data)

    with only_training_of(store, "legal"):
        pass
