"""Every system call of every operation on a store fails once: the error is ours, the store is sound, repeating works.

All writing goes through `os` in registry/store/files.py, so the calls are counted and failed there, one by one.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import LoraryError, StorageFullError
from lorary.registry.maintenance.verify import verify_store
from lorary.registry.store.gc import collect_garbage
from lorary.registry.store.store import Store

CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "utime")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EMFILE, errno.EINTR)


class Faults:
    """Counts the calls; the one with the number `at` fails."""

    def __init__(self, at: int, number: int):
        self.at, self.number, self.count = at, number, 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **more: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **more)

        return failing


@contextmanager
def failing_at(at: int, number: int) -> Iterator[Faults]:
    faults = Faults(at, number)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, faults.wrap(getattr(os, name)))
        yield faults


@pytest.fixture
def make(draft: Any, tmp_path: Path) -> Callable[[int], Store]:
    """`make(3)` is a fresh store, the third, with two versions, one of them removed, and a stray blob."""

    def store(number: int) -> Store:
        made = Store.create(tmp_path / str(number), {})
        for content in (b"one", b"two"):
            made.commit(draft, {"a": (content, "expert"), "b": (b"same", "expert")})
        made.remove("legal@1")
        made.blobs.put(b"stray")
        return made

    return store


OPERATIONS: dict[str, Callable[[Store, Any], Any]] = {
    "commit": lambda store, draft: store.commit(draft, {"a": (b"three", "expert"), "b": (b"same", "expert")}),
    "set_alias": lambda store, draft: store.set_alias("legal", "production", 2),
    "remove": lambda store, draft: store.remove("legal@2"),
    "restore": lambda store, draft: store.restore("legal@1"),
    "gc": lambda store, draft: collect_garbage(store, grace_s=-2),
}


def is_done(name: str, store: Store) -> bool:
    """Whether the operation took effect, as another process would see it."""
    return {
        "commit": lambda: 3 in store.versions("legal"),
        "set_alias": lambda: store.aliases("legal").get("production") == 2,
        "remove": lambda: 2 not in store.versions("legal"),
        "restore": lambda: 1 in store.versions("legal"),
        "gc": lambda: False,
    }[name]()


FAST, *SLOW = ERRNOS


@pytest.mark.parametrize(
    "number",
    [FAST, *(pytest.param(number, marks=pytest.mark.slow) for number in SLOW)],
    ids=lambda number: errno.errorcode[number],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_that_fails_leaves_a_sound_store_and_repeating_works(
    name: str, number: int, make: Callable[[int], Store], draft: Any
) -> None:
    operation, at = OPERATIONS[name], 0
    while True:
        at += 1
        store = make(at)
        error: Exception | None = None
        with failing_at(at, number) as faults:
            try:
                operation(store, draft)
            except (LoraryError, OSError) as caught:
                error = caught
        assert error is None or isinstance(error, LoraryError), f"call {at}: {error!r}"
        if error is not None and number in (errno.ENOSPC, errno.EDQUOT):
            assert isinstance(error, StorageFullError)
        opened = Store.open(store.path)
        assert [one for one in verify_store(opened) if one.state != "ok"] == []
        if error is not None and not is_done(name, opened):
            operation(opened, draft)
        assert [one for one in verify_store(opened) if one.state != "ok"] == []
        if name != "gc":
            assert is_done(name, opened), f"call {at}"
        if faults.count < at:
            break
    assert at > 2, "no call was counted"
