"""Builds the model of a planned composition: reads and verifies its packs, stacks and attaches their banks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...adapters.layer.attach import attach
from ...adapters.layer.stack import Stack
from ...adapters.router.router import DomainRouter, Temperatures
from ...domains.errors import IntegrityError
from ..base.load import LoadedBase, check_fit
from ..pack.check_pack import check_pack
from ..pack.pack import DomainPack, Routable, read_pack
from ..store.store import Store
from .cache import KeptComposition, StackCache
from .plan import Plan
from .saved import is_saved_composition, saved_pack


def compose_model(store: Store, plan: Plan, base: LoadedBase) -> PreTrainedModel:
    """An ordinary transformers model: the base with the planned slots attached.

    What was put together once is kept in the store's cache; composing it again reads one file.

    Raises:
        IntegrityError: A file of a pack differs from its digest.
    """
    cache, dtype = StackCache(store.cache), base.model.dtype
    kept = cache.get(plan, dtype)
    if kept is None:
        packs = read_packs(store, plan)
        stack = _stack(plan, packs, base).stacked(dtype)
        router = None if plan.static else build_router(packs, _shares(plan), width=base.layout.width)
        kept = KeptComposition(stack, router)
        cache.put(plan, dtype, kept)
    return attach(base.model, kept.stack, router=kept.router, fixed=_shares(plan) if plan.static else None)


def compose_saved(folder: Path, plan: Plan, base: LoadedBase) -> PreTrainedModel:
    """The model of a saved composition, read from its own folder."""
    return compose_packs(plan, read_saved_packs(folder, plan), base)


def packs_of(store: Store, composition: str, plan: Plan) -> list[DomainPack]:
    """The packs of a plan, wherever its composition is: in the store, or in a folder of its own."""
    is_saved = is_saved_composition(composition)
    return read_saved_packs(Path(composition), plan) if is_saved else read_packs(store, plan)


def read_packs(store: Store, plan: Plan) -> list[DomainPack]:
    """The packs of a plan, in the order of its slots."""
    return [read_pack(store, slot.manifest) for slot in plan.slots]


def read_saved_packs(folder: Path, plan: Plan) -> list[DomainPack]:
    """The packs of a saved composition's plan, from its own folder; nobody vouches for it, so they are proved.

    Raises:
        IntegrityError: One of them is not what it says, or has other files beside its own.
    """
    packs = []
    for slot in plan.slots:
        source = saved_pack(folder, slot.name)
        source.check_nothing_else(slot.manifest)
        packs.append(check_pack(source, slot.manifest))
    return packs


def compose_packs(plan: Plan, packs: list[DomainPack], base: LoadedBase) -> PreTrainedModel:
    """The same from packs in memory, in the order of the plan's slots.

    Raises:
        IntegrityError: A pack does not fit the base model.
    """
    stack, shares = _stack(plan, packs, base), _shares(plan)
    if plan.static:
        return attach(base.model, stack, router=None, fixed=shares)
    return attach(base.model, stack, router=build_router(packs, shares, width=base.layout.width))


def _stack(plan: Plan, packs: list[DomainPack], base: LoadedBase) -> Stack:
    for slot, pack in zip(plan.slots, packs, strict=True):
        check_fit(pack, base, source=f"{slot.name}@{slot.manifest.version}")
    names = tuple(slot.name for slot in plan.slots)
    return Stack(names=names, banks=tuple(pack.bank for pack in packs), static=plan.static)


def _shares(plan: Plan) -> torch.Tensor:
    return torch.tensor([slot.prior for slot in plan.slots])


def build_router(packs: Sequence[Routable], shares: torch.Tensor, *, width: int) -> DomainRouter:
    """The router of these slots, from their statistics alone; the KP slot is first.

    Experts below the feature layer change the hidden state that is read there. A composition that has some (adapters
    made elsewhere often start in layer 0) routes by token evidence only.

    Raises:
        IntegrityError: Statistics of these packs are not of one kind.
    """
    _check_same_features(packs)
    temperatures = joint_temperatures(packs[1:])
    if min(pack.first_layer for pack in packs) < packs[0].feature_layer:
        temperatures = replace(temperatures, hidden=0.0)
    return DomainRouter([pack.statistics for pack in packs], prior=shares, temperatures=temperatures, width=width)


def _check_same_features(packs: Sequence[Routable]) -> None:
    """Statistics are comparable only if they count the same tokens and describe the input of the same layer."""
    expected = _kind_of_statistics(packs[0])
    for pack in packs:
        found = _kind_of_statistics(pack)
        if found != expected:
            raise IntegrityError(
                "The packs cannot be routed together.",
                cause=f"(tokens, features, feature layer) is {found} and {expected}",
            )


def _kind_of_statistics(pack: Routable) -> tuple[int, int, int]:
    return len(pack.statistics.token_counts), len(pack.statistics.feature_sum), pack.feature_layer


def joint_temperatures(packs: Sequence[Routable]) -> Temperatures:
    """The temperatures of several domains together: their means (geometric for tokens), the same in any order."""
    if not packs:
        return Temperatures()
    tokens = math.exp(math.fsum(math.log(pack.temperatures.token) for pack in packs) / len(packs))
    return Temperatures(token=tokens, hidden=math.fsum(pack.temperatures.hidden for pack in packs) / len(packs))
