"""Safetensors files whose header is validated before parsing, and whose values are finite.

The safetensors parser reads headers of up to 100 MB and accepts repeated names; a 33 MB header costs it seconds and a
gigabyte. Here the header must be small strict JSON that accounts for every byte of the file exactly once.
"""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...domains.errors import IncompatibleError, IntegrityError
from ..store.strict_json import parse_json

MAX_HEADER: Final = 1 << 20  # bytes
MAX_TENSORS: Final = 20_000
MAX_AXES: Final = 4
METADATA: Final = {"format": "pt"}  # what safetensors.torch writes; nothing else is accepted

# bytes per number, by the type's name in safetensors
PACK_TYPES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
EIGHT_BIT_TYPES: Final = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
ADAPTER_TYPES: Final = PACK_TYPES | EIGHT_BIT_TYPES  # float32 holds every number of an 8-bit type
_OTHER_TYPES: Final = ("BOOL", "U8", "I8", "I16", "U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
_NAME: Final = re.compile(r"[A-Za-z0-9_.]{1,255}")
_LENGTH: Final = 8  # bytes of the header length


def save_tensors(tensors: dict[str, Tensor]) -> bytes:
    """Return the tensors as a safetensors file; equal tensors give equal bytes."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=METADATA)


def load_tensors(data: bytes, *, source: str, types: Mapping[str, int] = PACK_TYPES) -> dict[str, Tensor]:
    """Return the tensors of a file, sorted by name, those of 8-bit types as float32; `source` names it in errors.

    Args:
        types: Accepted types with their sizes.

    Raises:
        IntegrityError: The file is not one that `save_tensors` could have written, or a value is not finite.
        IncompatibleError: It has numbers of a type that safetensors knows, and an adapter cannot have.
    """
    _check_header(data, source, types)
    try:
        tensors = load(data)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise _unreadable(source, str(error)) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensors[name] = tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise IntegrityError(f"{source} has values that are not finite.", cause=f"in the tensor {name}")
    return dict(sorted(tensors.items()))  # the parser returns them in no fixed order


def _check_header(data: bytes, source: str, types: Mapping[str, int]) -> None:
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or length > min(MAX_HEADER, len(data) - _LENGTH):
        cause = f"a header of {length} bytes in a file of {len(data)}; at most {MAX_HEADER} are read"
        raise _unreadable(source, cause)
    header = parse_json(data[_LENGTH : _LENGTH + length], source=f"{source}: its header")
    if not isinstance(header, dict):
        raise _unreadable(source, "its header is no object")
    if header.pop("__metadata__", METADATA) != METADATA:
        raise _unreadable(source, f"its header has metadata other than {METADATA}")
    if len(header) > MAX_TENSORS:
        raise _unreadable(source, f"it has {len(header)} tensors; at most {MAX_TENSORS} are read")
    ranges = sorted(_range(name, entry, source, types) for name, entry in header.items())
    ends = [(0, 0), *ranges, (len(data) - _LENGTH - length,) * 2]
    if any(before[1] != after[0] for before, after in pairwise(ends)):
        raise _unreadable(source, "its tensors overlap, or leave bytes between or behind them")


def _range(name: str, entry: Any, source: str, types: Mapping[str, int]) -> tuple[int, int]:
    """Return the start and end offset of a tensor's bytes, checked against its shape."""
    if not _NAME.fullmatch(name):
        raise _unreadable(source, f"a tensor is named {name[:80]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unreadable(source, f"{name} has another description than dtype, shape and data_offsets")
    if entry["dtype"] not in list(types):
        cause = f"{name} has numbers of type {str(entry['dtype'])[:20]!r}, not {', '.join(types)}"
        if types is ADAPTER_TYPES and entry["dtype"] in _OTHER_TYPES:
            fix = "convert its tensors to float32 and save them again"
            raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause, fix=fix)
        raise _unreadable(source, cause)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_counts(shape) and len(shape) <= MAX_AXES and _are_counts(offsets) and len(offsets) == 2):
        raise _unreadable(source, f"{name} has a shape or offsets that are no counts")
    size = math.prod(shape) * types[entry["dtype"]]
    if offsets[1] - offsets[0] != size:
        raise _unreadable(source, f"{name} has {offsets[1] - offsets[0]} bytes, its shape {shape} needs {size}")
    return offsets[0], offsets[1]


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _unreadable(source: str, cause: str) -> IntegrityError:
    return IntegrityError(f"{source} cannot be read.", cause=cause, fix="download the file again")
