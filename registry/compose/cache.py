"""Cache stacked compositions on disk, so that composing the same plan again reads one file.

    <store>/cache/compositions/<key>.safetensors

The key is the digest of everything that determines the content: the manifests of the slots (which contain the digest of
every file), priors, static or routed, dtype of the base model, layout of the file and method of the router. The file
holds one long tensor per dtype, which is mapped into memory and used in place.

Before use, all bytes are compared with a checksum in the file's metadata. It detects damage, not tampering: anyone who
can write to the store can replace the checksum as well, and could a sha256. A damaged file is deleted and rebuilt from
the packs, which are verified by sha256. The cache can be deleted at any time.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...adapters.layer.stacked import StackedComposition
from ...adapters.router.router import METHOD, DomainRouter
from ...domains.errors import StorageFullError
from ..store.blobs import hex_of, sha256_of
from ..store.files import make_folder, touch, write_atomic
from ..store.strict_json import canonical_json
from .plan import Plan

LAYOUT = "lorary.stack/2"
MAX_FILES = 16
MAX_BYTES = 4 << 30
ALIGNMENT = 64  # bytes, of every tensor inside a long one
_CHUNK = 8192  # 64-bit words per sum of the checksum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedComposition:
    """Arguments of `attach` for one composition."""

    stack: StackedComposition
    router: DomainRouter | None


class CompositionCache:
    """Stacked compositions of one store, least recently used ones evicted first."""

    def __init__(self, cache: Path):
        self.folder = cache / "compositions"

    def path(self, plan: Plan, dtype: torch.dtype) -> Path:
        """Return the path of a composition's file, whether or not it exists."""
        key = {
            "layout": LAYOUT,
            "router": METHOD,
            "dtype": str(dtype),
            "static": plan.static,
            "slots": [[sha256_of(slot.manifest.to_json()), slot.prior] for slot in plan.slots],
        }
        return self.folder / f"{hex_of(sha256_of(canonical_json(key)))}.safetensors"

    def get(self, plan: Plan, dtype: torch.dtype) -> CachedComposition | None:
        """Return a cached composition, or None if it is missing or damaged; a damaged file is deleted."""
        path = self.path(plan, dtype)
        try:
            cached = _read(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            logger.warning("The cached composition %s is damaged and is rebuilt: %s", path, error)
            with suppress(OSError):  # a read-only store
                path.unlink()
            return None
        if os.access(path, os.W_OK):
            with suppress(FileNotFoundError):  # another process may evict it meanwhile
                touch(path)  # the time of last use, for eviction
        return cached

    def put(self, plan: Plan, dtype: torch.dtype, cached: CachedComposition) -> None:
        """Write a composition if the store is writable, and evict files beyond the limits."""
        if not os.access(self.folder.parent, os.W_OK):
            logger.info("%s is not writable: the composition is not cached", self.folder.parent)
            return
        make_folder(self.folder)
        try:
            write_atomic(self.path(plan, dtype), _to_bytes(cached))
        except StorageFullError as error:
            logger.warning("The composition is not cached: %s", error)
        self._evict()

    def _evict(self) -> None:
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process evicts, too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = 0
        for place, (_, size, path) in enumerate(sorted(files, reverse=True)):
            total += size
            if place and (place >= MAX_FILES or total > MAX_BYTES):
                path.unlink(missing_ok=True)


def _to_bytes(cached: CachedComposition) -> bytes:
    tensors, described = cached.stack.to_tensors()
    if cached.router is not None:
        tensors = tensors | {f"router.{name}": tensor for name, tensor in cached.router.tensors().items()}
    long, places = _concatenate(tensors)
    document = json.dumps({"stack": described, "places": places, "routed": cached.router is not None})
    # a single metadata entry: safetensors writes several in no fixed order
    return save(long, metadata={LAYOUT: json.dumps([checksum(long, document), document])})


def _read(path: Path) -> CachedComposition:
    with safe_open(path, "pt") as file:
        expected, composition = json.loads(file.metadata()[LAYOUT])
        long = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksum(long, composition) != expected:
        raise ValueError("its content differs from its checksum")
    document = json.loads(composition)
    tensors = _views(long, document["places"])
    router = {name.removeprefix("router."): t for name, t in tensors.items() if name.startswith("router.")}
    return CachedComposition(
        StackedComposition.from_tensors(tensors, document["stack"]),
        DomainRouter.from_tensors(router) if document["routed"] else None,
    )


def checksum(long: Mapping[str, Tensor], document: str) -> str:
    """Return the sha256 of the document and of the sums of 64-bit words over each 64 KiB of the tensors.

    It takes 2 ms for 86 MB, where sha256 of all bytes takes 52 ms (docs/log.md), more than the rest of composing. The
    number of bytes of each tensor is a multiple of 8.
    """
    digest = hashlib.sha256(document.encode())
    for name in sorted(long):
        words = long[name].view(torch.int64)
        whole = len(words) // _CHUNK * _CHUNK
        sums = torch.cat([words[:whole].view(-1, _CHUNK).sum(1), words[whole:].sum().unsqueeze(0)])
        digest.update(f"{name} {len(words)}".encode() + sums.numpy().tobytes())
    return digest.hexdigest()


def _concatenate(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return one long tensor per dtype, and the place of each tensor as [dtype, start, shape]."""
    pieces: dict[str, list[Tensor]] = {}
    lengths: dict[str, int] = {}
    places = {}
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        start, flat = lengths.get(dtype, 0), tensor.detach().cpu().reshape(-1)
        padding = -len(flat) % (ALIGNMENT // flat.element_size())
        pieces.setdefault(dtype, []).extend([flat, flat.new_zeros(padding)])
        lengths[dtype] = start + len(flat) + padding
        places[name] = [dtype, start, list(tensor.shape)]
    return {dtype: torch.cat(parts) for dtype, parts in pieces.items()}, places


def _views(long: Mapping[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors as views of the long ones."""
    return {
        name: long[dtype][start : start + math.prod(shape)].view(shape)
        for name, (dtype, start, shape) in places.items()
    }
