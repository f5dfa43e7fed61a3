"""Which implementation of the fused layer runs: chosen by the device, or by whoever asks.

with use_kernels("reference"):
    model(**inputs)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from ...domains.errors import InputError
from . import eager, reference

_KNOWN: dict[str, ModuleType] = {"reference": reference, "eager": eager}
_asked: list[str] = []  # the innermost choice is the last


def choose_kernels(device: torch.device) -> ModuleType:
    """The implementation for tensors on a device: the one that was asked for, or else the fastest there."""
    if _asked:
        return _KNOWN[_asked[-1]]
    return eager


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """While it is open, every fused layer of this process runs on one implementation.

    Raises:
        InputError: There is none of that name.
    """
    if name not in _KNOWN:
        raise InputError(f"There are no kernels named {name!r}.", fix=f"choose among: {', '.join(_KNOWN)}")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()
