"""Diagnose a machine and its registry, for bug reports.

Nothing is changed, except that two small files are created and deleted in the store's cache to probe the file system,
and that the speed of this CPU in bfloat16 is kept there where the base model is stored in it.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ...domains.errors import LoraryError
from ..base.dtype import AUTO, choose_dtype, keep_speedup
from ..base.find import find_base
from ..base.named import BASES, named_folder
from ..store.files import TEMPORARY_PREFIX
from ..store.gc import QUARANTINE
from ..store.manifest import BaseRecord
from ..store.store import BALLAST, STORE_FILE, Store

PACKAGES = ("lorary", "torch", "transformers", "safetensors", "huggingface-hub", "faiss-cpu", "accelerate", "peft")
MIN_FREE_BYTES = 1 << 30  # bytes

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    value: str
    verdict: Verdict = "ok"
    fix: str = ""  # a command or a hint


def examine(path: Path) -> list[Finding]:
    """Check the installed packages, the machine, the store at `path` and its disk."""
    found = [*_programs(), *_machine()]
    try:
        store = Store.open(path)
    except LoraryError as error:
        verdict: Verdict = "bad" if (path / STORE_FILE).exists() else "warn"
        found.append(Finding("registry", error.message, verdict, str(error.fix or "")))
        return found
    return [*found, *_store(store), *_disk(store.cache)]


def _programs() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield Finding(package, version(package))


def _machine() -> Iterator[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding(
        "processors", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    yield Finding("devices", ", ".join(["cpu", *devices]))


def _store(store: Store) -> Iterator[Finding]:
    yield Finding("registry", str(store.path))
    yield Finding("registry id", store.record.id)
    source = str(store.settings.get("source", "unknown"))
    revision = (store.settings.get("base") or {}).get("revision")
    yield Finding("base model", source + (f" at {revision}" if revision else ""), *_check_base(source, revision))
    yield from _dtype(store, source)
    names = store.domains()
    versions = sum(len(store.versions(name)) for name in names)
    removed = sum(len(store.removed(name)) for name in store.domains(removed=True))
    yield Finding("domains", f"{len(names)} with {versions} versions, {removed} removed")
    blobs = list(store.blobs.all())
    yield Finding("blobs", f"{len(blobs)} of {sum(map(store.blobs.size, blobs)):,} bytes")
    yield from _leftover_files(store)


def _check_base(source: str, revision: str | None) -> tuple[Verdict, str]:
    if "/" in source and not Path(source).exists() and source.count("/") == 1:
        return "ok", ""  # a Hub id: whether it is cached is found out on first use
    if source in BASES and not named_folder(BASES[source]).is_dir():
        return "warn", "not on this machine"
    try:
        find_base(source, revision=revision)
    except LoraryError as error:
        return "bad", error.message
    return "ok", ""


def _dtype(store: Store, source: str) -> Iterator[Finding]:
    """Find the dtype in which the base model is loaded on a CPU."""
    folder = named_folder(BASES[source]) if source in BASES else Path(source)
    try:
        record, pinned = BaseRecord(**store.settings["base"]), store.settings.get("dtype")
        chosen = choose_dtype(
            AUTO, pinned=pinned, device="cpu", record=record, folder=lambda: folder, cache=store.cache
        )
    except (KeyError, TypeError, ValueError, LoraryError) as error:
        yield Finding("dtype on the CPU", f"unknown: {error}", "bad")
        return
    keep_speedup(store.cache, chosen)
    yield Finding("dtype on the CPU", str(chosen))


def _leftover_files(store: Store) -> Iterator[Finding]:
    temporary = sum(1 for _ in store.path.glob(f"**/{TEMPORARY_PREFIX}*"))
    checkpoints = sum(1 for _ in store.runs.glob("*/checkpoint-*"))
    yield Finding("temporary files", str(temporary), "warn" if temporary else "ok", "registry gc" if temporary else "")
    yield Finding("checkpoints", str(checkpoints))
    aside = store.blobs.folder.with_name(QUARANTINE)
    count = len(os.listdir(aside)) if aside.is_dir() else 0
    if count:
        yield Finding("moved aside", f"{count} blobs, by an interrupted gc", "warn", "registry gc")
    has_ballast = (store.path / BALLAST).is_file()
    yield Finding("ballast", "there" if has_ballast else "missing", "ok" if has_ballast else "warn", "registry gc")


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    verdict: Verdict = "ok" if free >= MIN_FREE_BYTES else "warn"
    yield Finding("free space", f"{free:,} bytes", verdict, "registry gc" if verdict == "warn" else "")
    if not os.access(folder, os.W_OK):
        yield Finding("writable", "no: versions can be used, not added", "warn", f"ls -ld {folder}")
        return
    yield Finding("writable", "yes")
    probes = {"hard links": _probe_links, "locks": _probe_locks, "case": _probe_case, "clock": _probe_clock}
    for what, probe in probes.items():
        yield _run_probe(folder, what, probe)


def _run_probe(folder: Path, what: str, probe: Callable[[Path], tuple[str, Verdict]]) -> Finding:
    """Probe the file system with a temporary file."""
    file = folder / f"{TEMPORARY_PREFIX}doctor-{os.getpid()}-a"
    try:
        file.write_bytes(b"x")
        value, verdict = probe(file)
    except OSError as error:
        value, verdict = f"no: {error.strerror}", "warn"
    finally:
        for path in (file, file.with_name(file.name + "2")):
            with suppress(OSError):
                path.unlink()
    fix = "keep the registry on another disk" if verdict != "ok" else ""
    return Finding(what, value, verdict, fix)


def _probe_links(file: Path) -> tuple[str, Verdict]:
    os.link(file, file.with_name(file.name + "2"))
    return "yes", "ok"


def _probe_locks(file: Path) -> tuple[str, Verdict]:
    try:
        import fcntl
    except ImportError:
        return "not on this system; not required", "ok"
    with file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return "yes", "ok"


def _probe_case(file: Path) -> tuple[str, Verdict]:
    is_one = file.with_name(file.name.upper()).exists()
    return ("case-insensitive; packs never depend on case" if is_one else "case-sensitive"), "ok"


def _probe_clock(file: Path) -> tuple[str, Verdict]:
    off = file.stat().st_mtime - time.time()
    return f"the disk's is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}", "ok" if abs(off) < 600 else "warn"
