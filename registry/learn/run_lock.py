"""One training of a domain at a time: a second one is refused at once, with who runs the first, and since when.

    <store>/runs/locks/<name>.json      host, boot, process and its start, time, command of the owner

The owner holds a lock of the operating system on this file, which ends with its process. Where file systems have no
locks, the record decides: an owner on this machine is alive if its process is there and began when the record says. The
owner of another machine cannot be asked, and counts as alive.
"""

import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ...domains.errors import ConflictError, IntegrityError
from ...domains.names import check_name
from ..store.files import delete, file_lock, folder_lock, make_folder, process_start, write_atomic
from ..store.store import Store
from ..store.strict_json import JsonObject, canonical_json, parse_json, record_from_json, record_to_json

FOLDER: Final = "locks"
BOOT_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that trains a domain."""

    host: str
    boot: str  # of this start of the machine; empty where it has none
    process: int
    started: str  # when the process began, as the operating system counts; empty where it does not say
    since: str  # time, ISO 8601 in UTC
    command: str
    extra: JsonObject = field(default_factory=dict)

    @classmethod
    def here(cls) -> "Owner":
        """Return this process."""
        return cls(
            host=platform.node(),
            boot=_boot(),
            process=os.getpid(),
            started=process_start(os.getpid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
        )

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs; of another machine, yes."""
        if self.host != platform.node():
            return True
        if self.boot != _boot():
            return False
        if self.started:
            return process_start(self.process) == self.started
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@contextmanager
def only_training_of(store: Store, name: str) -> Generator[None]:
    """Hold the lock of a domain's training.

    Raises:
        ConflictError: Another process trains it.
    """
    folder = store.runs / FOLDER
    make_folder(folder)
    path = folder / f"{check_name(name)}.json"
    with folder_lock(folder):
        _refuse_if_taken(path, name)
        write_atomic(path, canonical_json(record_to_json(Owner.here())))
        held = file_lock(path)
        held.__enter__()
    try:
        yield
    finally:
        with folder_lock(folder):
            delete(path)
            held.__exit__(None, None, None)


def _refuse_if_taken(path: Path, name: str) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    owner = None
    with suppress(IntegrityError):  # cut off by a crash: the lock alone decides
        owner = record_from_json(Owner, parse_json(data, source=str(path)), source=str(path), keeps_unknown=True)
    with file_lock(path) as is_mine:
        if is_mine and (owner is None or not owner.is_alive):
            return
    who = "process unknown" if owner is None else f"process {owner.process} on {owner.host} since {owner.since}"
    is_elsewhere = owner is not None and owner.host != platform.node()
    raise ConflictError(
        f"{name} is being trained already.",
        cause=f"{who}{f', {owner.command}' if owner else ''}",
        fix=f"Wait for it, or if it does not run any more: rm '{path}'"
        if is_elsewhere or owner is None
        else f"Wait for it, or end it, then repeat the command: kill {owner.process}",
    )


def _boot() -> str:
    try:
        return BOOT_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return ""
