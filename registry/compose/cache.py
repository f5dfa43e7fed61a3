"""StackCache: compositions as they were last put together, so that composing one again is reading one file.

    <store>/cache/compositions/<key>.safetensors

The key is the digest of everything that decides the content: the manifests of the slots (which name every byte by its
digest), priors, kind, the base's type, this layout and the router's method. The file holds a few long tensors, mapped
into memory and used where they lie. Before it is used, every byte is read and compared with a checksum inside: sums
over 64 KiB each, hashed together. That finds damage at the speed of memory, which sha256 does not reach; it is no
protection from people who can write to the store, and neither would a digest be that lies beside the file. A damaged
file is dropped and made anew from the packs, which are verified by sha256. Everything here may be deleted at any time.
"""

import hashlib
import json
import logging
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
ALIGNMENT = 64  # bytes, of every tensor in a long one
_CHUNK = 8192  # words of 8 bytes in a sum of the checksum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptComposition:
    """What `attach` needs."""

    stack: StackedComposition
    router: DomainRouter | None


class StackCache:
    """The kept compositions of one store."""

    def __init__(self, cache: Path):
        self.folder = cache / "compositions"

    def path(self, plan: Plan, dtype: torch.dtype) -> Path:
        """Where a composition is, or would be."""
        content = {
            "layout": LAYOUT,
            "router": METHOD,
            "dtype": str(dtype),
            "static": plan.static,
            "slots": [[sha256_of(slot.manifest.to_json()), slot.prior] for slot in plan.slots],
        }
        return self.folder / f"{hex_of(sha256_of(canonical_json(content)))}.safetensors"

    def get(self, plan: Plan, dtype: torch.dtype) -> KeptComposition | None:
        """The composition, if it is kept and whole."""
        path = self.path(plan, dtype)
        try:
            kept = _read(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            logger.warning("The kept composition %s is damaged and is made anew: %s", path, error)
            with suppress(OSError):  # a store that may only be read
                path.unlink()
            return None
        if os.access(path, os.W_OK):
            with suppress(FileNotFoundError):  # dropped by another process meanwhile
                touch(path)  # the least recently used go first
        return kept

    def put(self, plan: Plan, dtype: torch.dtype, kept: KeptComposition) -> None:
        """Keeps a composition, where the store can be written to; drops the least recently used of too many."""
        if not os.access(self.folder.parent, os.W_OK):
            logger.info("%s cannot be written to: the composition is not kept", self.folder.parent)
            return
        make_folder(self.folder)
        try:
            write_atomic(self.path(plan, dtype), _to_bytes(kept))
        except StorageFullError as error:
            logger.warning("The composition is not kept: %s", error)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process drops some, too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = 0
        for place, (_, size, path) in enumerate(sorted(files, reverse=True)):
            total += size
            if place and (place >= MAX_FILES or total > MAX_BYTES):
                path.unlink(missing_ok=True)


def _to_bytes(kept: KeptComposition) -> bytes:
    tensors, described = kept.stack.to_tensors()
    if kept.router is not None:
        tensors = tensors | {f"router.{name}": tensor for name, tensor in kept.router.tensors().items()}
    long, places = _join(tensors)
    document = json.dumps({"stack": described, "places": places, "routed": kept.router is not None})
    # one entry: safetensors writes several in no fixed order
    return save(long, metadata={LAYOUT: json.dumps([checksum(long, document), document])})


def _read(path: Path) -> KeptComposition:
    with safe_open(path, "pt") as file:
        expected, composition = json.loads(file.metadata()[LAYOUT])
        long = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksum(long, composition) != expected:
        raise ValueError("its bytes differ from its checksum")
    document = json.loads(composition)
    tensors = _split(long, document["places"])
    router = {name.removeprefix("router."): t for name, t in tensors.items() if name.startswith("router.")}
    return KeptComposition(
        StackedComposition.from_tensors(tensors, document["stack"]),
        DomainRouter.from_tensors(router) if document["routed"] else None,
    )


def checksum(long: Mapping[str, Tensor], document: str) -> str:
    """Sums of 64-bit words over 64 KiB each, of tensors whose bytes are a multiple of 8, hashed with the document."""
    digest = hashlib.sha256(document.encode())
    for name in sorted(long):
        words = long[name].view(torch.int64)
        whole = len(words) // _CHUNK * _CHUNK
        sums = torch.cat([words[:whole].view(-1, _CHUNK).sum(1), words[whole:].sum().unsqueeze(0)])
        digest.update(f"{name} {len(words)}".encode() + sums.numpy().tobytes())
    return digest.hexdigest()


def _join(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One long tensor of each type, and where everything is in it."""
    pieces: dict[str, list[Tensor]] = {}
    lengths: dict[str, int] = {}
    places = {}
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        start, flat = lengths.get(kind, 0), tensor.detach().cpu().reshape(-1)
        padding = -len(flat) % (ALIGNMENT // flat.element_size())
        pieces.setdefault(kind, []).extend([flat, flat.new_zeros(padding)])
        lengths[kind] = start + len(flat) + padding
        places[name] = [kind, start, list(tensor.shape)]
    return {kind: torch.cat(parts) for kind, parts in pieces.items()}, places


def _split(long: Mapping[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors as views of the long ones."""
    found = {}
    for name, (kind, start, shape) in places.items():
        length = 1
        for size in shape:
            length *= size
        found[name] = long[kind][start : start + length].view(shape)
    return found
