"""Choice of the fused layer's implementation: the fastest for the device, or the one selected by `use_kernels`.

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

_selected: list[str] = []  # names of the open `use_kernels` contexts, innermost last


def choose_kernels(device: torch.device) -> ModuleType:
    """Return the implementation selected by `use_kernels`, else the fastest for the device."""
    if _selected:
        return _load(_selected[-1])
    return _load("triton") if device.type == "cuda" and has_triton() else eager


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; CUDA builds of torch for Linux depend on it."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Run all fused layers of this process on one implementation inside the context.

    Raises:
        InputError: The name is unknown, or Triton is not installed.
    """
    if name not in NAMES:
        raise InputError(f"There are no kernels named {name!r}.", fix=f"choose one of: {', '.join(NAMES)}")
    if name == "triton" and not has_triton():
        raise InputError("Triton is not installed.", fix="pip install 'lorary[gpu]'")
    _selected.append(name)
    try:
        yield
    finally:
        _selected.pop()


def _load(name: str) -> ModuleType:
    if name == "triton":
        from . import triton_group

        return triton_group
    return reference if name == "reference" else eager
