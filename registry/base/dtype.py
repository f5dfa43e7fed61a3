"""Resolve the dtype in which a base model is loaded, and measure once whether this CPU is fast in bfloat16.

Many base models are stored in bfloat16. A CPU with instructions for it computes twice as fast in it as in float32, one
without them several times slower. What is measured stays in the store's cache, by machine: packs do not depend on it,
and another machine measures for itself.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from ...domains.errors import InputError
from ..store.blobs import hex_of, sha256_of
from ..store.files import write_atomic
from ..store.manifest import BaseRecord
from ..store.strict_json import canonical_json
from .find import POCKET

AUTO: Final = "auto"
DTYPES: Final = (AUTO, "float32", "bfloat16", "float16")
CLEARLY_FASTER: Final = 1.5  # times; below, the coarser numbers are not worth it
CACHE_FILE: Final = "dtype.json"
_TOKENS: Final = 256  # of a block in training
_MAX_WIDTH: Final = 1024  # wider products have about the same ratio, and take longer
_ROUNDS: Final = 9


@dataclass(frozen=True)
class ChosenDtype:
    """The dtype of a base model on this machine, and why."""

    name: str  # float32, bfloat16, float16; auto is that of the model's files
    reason: str
    speedup: float | None = None  # measured: how many times as fast bfloat16 is as float32

    def __str__(self) -> str:
        return f"{'that of its files' if self.name == AUTO else self.name}: {self.reason}"


def check_dtype(dtype: str) -> str:
    """Return a dtype that a user gave.

    Raises:
        InputError: It is none of those that a base model is loaded in.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is no dtype of a base model.", fix=f"choose among {', '.join(DTYPES)}")
    return dtype


def choose_dtype(
    asked: str, *, pinned: str | None, device: str, record: BaseRecord, folder: Callable[[], Path], cache: Path
) -> ChosenDtype:
    """Choose the dtype of a base model: what is asked for, what the registry was made with, or what is fast here.

    Args:
        asked: What the caller asks for; `auto` leaves the choice to the registry.
        pinned: What was asked for when the registry was made.
        device: Where the model is loaded.
        record: Fingerprint of the model.
        folder: Returns its folder; called where something has to be measured.
        cache: The store's cache, in which the measurement is kept; it may be missing.

    Raises:
        InputError: It is none of those that a base model is loaded in.
    """
    if check_dtype(asked) != AUTO:
        return ChosenDtype(asked, "as asked for")
    if pinned is not None and check_dtype(pinned) != AUTO:
        return ChosenDtype(pinned, "as the registry was made")
    if device != "cpu":
        return ChosenDtype(AUTO, f"on {device}")
    if record.dtype != "bfloat16" or record.quantization is not None:
        return ChosenDtype("float32", "the base model is not in bfloat16")
    if record.id == POCKET:
        return ChosenDtype("float32", "the pocket base computes the same on every machine")
    speedup = _kept_speedup(cache)
    if speedup is None:
        speedup = measure_speedup(_width(folder()))
    ratio = f"{speedup:.1f} times the speed of float32"
    if speedup >= CLEARLY_FASTER:
        return ChosenDtype("bfloat16", f"{ratio} on this CPU", speedup)
    return ChosenDtype("float32", f"bfloat16 has {ratio} on this CPU", speedup)


def keep_speedup(cache: Path, chosen: ChosenDtype) -> None:
    """Keep what was measured on this machine in a store's cache, unless that is read-only."""
    if chosen.speedup is None or not os.access(cache, os.W_OK) or _kept_speedup(cache) is not None:
        return
    known = _read(cache) | {_machine(): {"bfloat16_speedup": round(chosen.speedup, 3)}}
    write_atomic(cache / CACHE_FILE, canonical_json(known))


def measure_speedup(width: int) -> float:
    """Return how many times as fast as in float32 a block of tokens is multiplied in bfloat16; takes 0.1 s.

    Both take turns, so that other work on the machine slows both.
    """
    import torch

    width = min(width, _MAX_WIDTH)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, width, generator=generator) for size in (_TOKENS, width))
    factors = [(x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            for of_dtype, (left, right) in zip(seconds, factors, strict=True):
                began = time.perf_counter()
                torch.nn.functional.linear(left, right)
                of_dtype.append(time.perf_counter() - began)
    full, half = (statistics.median(of_dtype[1:]) for of_dtype in seconds)  # the first call sets things up
    return full / half


def _width(folder: Path) -> int:
    """Return the hidden size of a base model; configs have several names for it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:  # not on this machine yet
        return _MAX_WIDTH
    config = config.get("text_config") or config
    found = next((config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config), None)
    return found if type(found) is int and found > 0 else _MAX_WIDTH


def _kept_speedup(cache: Path) -> float | None:
    kept = _read(cache).get(_machine())
    value = kept.get("bfloat16_speedup") if isinstance(kept, dict) else None
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _read(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache / CACHE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _machine() -> str:
    """Return what the speed depends on: the CPU with its instructions, and the version of torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    processor = hex_of(sha256_of("\n".join([platform.machine(), platform.processor(), *kinds]).encode()))[:16]
    return f"{processor} torch {version('torch')}"
