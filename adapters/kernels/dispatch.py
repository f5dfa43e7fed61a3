"""Which implementation of the fused layer runs: chosen by the device, or by whoever asks.

with use_kernels("reference"):
    model(**inputs)
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from ...domains.errors import InputError
from . import eager, reference

NAMES = ("reference", "eager", "triton")

_asked: list[str] = []  # the innermost choice is the last


def choose_kernels(device: torch.device) -> ModuleType:
    """The implementation for tensors on a device: the one that was asked for, or else the fastest there."""
    if _asked:
        return _load(_asked[-1])
    return _load("triton") if device.type == "cuda" and has_triton() else eager


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch for CUDA on Linux brings it."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """While it is open, every fused layer of this process runs on one implementation.

    Raises:
        InputError: There is none of that name, or Triton is not installed.
    """
    if name not in NAMES:
        raise InputError(f"There are no kernels named {name!r}.", fix=f"choose among: {', '.join(NAMES)}")
    if name == "triton" and not has_triton():
        raise InputError("Triton is not installed.", fix="pip install 'lorary[gpu]'")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def _load(name: str) -> ModuleType:
    if name == "triton":
        from . import triton_group

        return triton_group
    return reference if name == "reference" else eager
