"""The frozen proof: digests of everything that must not change, taken before and after training and compared.

What is proved frozen: every tensor of the base model and every older expert and gate in the model that trains, by
hashing them before and after; and all stored versions: each manifest has the same bytes before and after, and each file
of a version that is not removed has the bytes of its digest (gc deletes those of removed versions). A file is hashed
unless it was hashed since it was last written to (see registry/store/hashed_files.py).

The proof names no stored version, because the pack may be published: it has the store's root (registry/store/root.py)
before and after. The roots differ only by what other processes committed, removed or renamed meanwhile.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...domains.errors import IntegrityError
from ..store.hashed_files import check_files
from ..store.root import StoreState, read_state
from ..store.store import Store


@dataclass(frozen=True)
class FrozenDigests:
    """Digests of everything that must not change."""

    base: str  # of all tensors of the base model
    attached: str  # of all frozen expert tensors and gates in the composed model
    store: StoreState  # manifests, of removed versions too, aliases and tombstones; other versions' files are verified
    tensors: int  # how many tensors the first two cover


def frozen_digests(base: PreTrainedModel, composed: PreTrainedModel, store: Store) -> FrozenDigests:
    """Hash the base model and the frozen part of the composed one, and verify the stored packs.

    Raises:
        IntegrityError: A file of a version that is not removed differs from its digest.
    """
    base_tensors = dict(_stored_tensors(base.state_dict(keep_vars=True).items()))
    own = {tensor.data_ptr() for tensor in base_tensors.values()}
    trainable = {id(p) for p in trainable_parameters(composed)}
    frozen = [(n, t) for n, t in [*composed.named_parameters(), *composed.named_buffers()] if id(t) not in trainable]
    attached = {name: tensor for name, tensor in _stored_tensors(frozen) if tensor.data_ptr() not in own}
    state = read_state(store)
    check_files(store, [manifest for name in store.domains(removed=True) for manifest in store.history(name)])
    return FrozenDigests(
        digest_of_tensors(base_tensors.items()),
        digest_of_tensors(attached.items()),
        state,
        len(base_tensors) + len(attached),
    )


def trainable_parameters(composed: PreTrainedModel) -> list[Tensor]:
    """Return the new bank's parameters, the only ones that may be trained."""
    names = ("new_A", "new_B", "new_expert_gate", "new_rank_gate")
    return [p for name, p in composed.named_parameters() if name.rpartition(".")[2] in names]


def check_only_new_is_trainable(composed: PreTrainedModel) -> None:
    """Refuse a model in which anything but the new bank would be trained.

    Raises:
        IntegrityError: Names the first parameter that must be frozen and is not.
    """
    allowed = {id(p) for p in trainable_parameters(composed)}
    for name, tensor in [*composed.named_parameters(), *composed.named_buffers()]:
        if tensor.requires_grad and id(tensor) not in allowed:
            raise IntegrityError(
                "A frozen tensor is set to be trained.",
                cause=f"{name} requires a gradient, only the new bank may",
                fix="nothing was stored; report this with the traceback of LORARY_DEBUG=1",
            )


def prove(before: FrozenDigests, after: FrozenDigests) -> dict[str, Any]:
    """Compare two sets of digests and return the proof that the manifest records.

    Raises:
        IntegrityError: Something that must be frozen has changed; names it, with both digests.
    """
    for part in ("base", "attached"):
        _compare(f"tensors of the {part} model", getattr(before, part), getattr(after, part))
    versions = after.store.versions  # others may have been committed meanwhile
    for name, digest in before.store.versions.items():
        _compare(f"pack {name}", digest, versions.get(name, "missing"))
    frozen = {
        "base": before.base,
        "attached": before.attached,
        "store": {"before": before.store.root, "after": after.store.root},
        "tensors": before.tensors,
    }
    return {"frozen": frozen, "unchanged": True}


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return f"sha256:{total.hexdigest()}"


def _stored_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, and in place of a quantised one (a subclass of Tensor) those that it is made of."""
    for name, tensor in named:
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
            yield from _stored_tensors((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield name, tensor


def _compare(what: str, before: str, after: str) -> None:
    if before != after:
        raise IntegrityError(
            f"Training changed the {what}, which must stay frozen.",
            cause=f"before {before}, after {after}",
            fix="nothing was stored; report this with the traceback of LORARY_DEBUG=1",
        )
