"""Build the model of a planned composition: read and verify its packs, stack their banks and attach them."""

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
from ...domains.statistics.token_roles import TokenRoles
from ..base.load import LoadedBase, check_fit
from ..pack.check_pack import check_pack
from ..pack.pack import DomainPack, Routable, one_edition, read_pack
from ..store.store import Store
from .cache import CachedComposition, CompositionCache
from .plan import Plan
from .saved import is_saved_composition, saved_pack


def compose_model(store: Store, plan: Plan, base: LoadedBase) -> PreTrainedModel:
    """Return the base model with the planned slots attached, as an ordinary transformers model.

    The stacked tensors are cached in the store, so composing the same plan again reads one file. The model has its plan
    as `model.composition`.

    Raises:
        IntegrityError: A file of a pack differs from its digest.
    """
    cache, dtype = CompositionCache(store.cache), base.model.dtype
    cached = cache.get(plan, dtype)
    if cached is None:
        packs = read_packs(store, plan)
        stack = _stack_banks(plan, packs, base).stacked(dtype)
        router = None if plan.static else base_router(packs, _priors(plan), base)
        cached = CachedComposition(stack, router)
        cache.put(plan, dtype, cached)
    model = attach(base.model, cached.stack, router=cached.router, fixed=_priors(plan) if plan.static else None)
    return _with_plan(model, plan)


def compose_saved(folder: Path, plan: Plan, base: LoadedBase) -> PreTrainedModel:
    """Return the model of a saved composition, read from its folder."""
    return compose_packs(plan, read_saved_packs(folder, plan), base)


def compose_packs(plan: Plan, packs: list[DomainPack], base: LoadedBase) -> PreTrainedModel:
    """Return the model of a plan from packs in memory, in the order of the plan's slots.

    Raises:
        IntegrityError: A pack does not fit the base model.
    """
    stack, priors = _stack_banks(plan, packs, base), _priors(plan)
    router = None if plan.static else base_router(packs, priors, base)
    return _with_plan(attach(base.model, stack, router=router, fixed=priors if plan.static else None), plan)


def packs_of(store: Store, composition: str, plan: Plan) -> list[DomainPack]:
    """Return the packs of a plan, from the store or from the folder of a saved composition."""
    is_saved = is_saved_composition(composition)
    return read_saved_packs(Path(composition), plan) if is_saved else read_packs(store, plan)


def read_packs(store: Store, plan: Plan) -> list[DomainPack]:
    """Return the packs of a plan from the store, in the order of its slots."""
    return [read_pack(store, slot.manifest) for slot in plan.slots]


def read_saved_packs(folder: Path, plan: Plan) -> list[DomainPack]:
    """Return the packs of a saved composition, which are checked like packs from an untrusted source.

    Raises:
        IntegrityError: A pack contradicts its manifest, or its folder contains other files.
    """
    packs = []
    for slot in plan.slots:
        source = saved_pack(folder, slot.name)
        source.check_nothing_else(slot.manifest)
        packs.append(check_pack(source, slot.manifest))
    return packs


def base_router(packs: Sequence[Routable], priors: torch.Tensor, base: LoadedBase) -> DomainRouter:
    """Return the router of these slots over a base model, KP first.

    Raises:
        IntegrityError: The statistics of the packs are not comparable.
        IncompatibleError: Packs of two editions of the router cannot be routed together.
    """
    return build_router(packs, priors, width=base.layout.width, roles=base.roles)


def build_router(
    packs: Sequence[Routable], priors: torch.Tensor, *, width: int, roles: TokenRoles | None
) -> DomainRouter:
    """Return the router of these slots, computed from the statistics of their packs.

    Experts below the feature layer change the hidden state that the router reads there. Compositions with such experts
    (imported adapters often start at layer 0) are routed by the tokens alone. All are routed by the oldest edition of
    the router that one of the packs was made for.

    Args:
        packs: The KP slot first.
        priors: Prior of each slot, (slots,).
        width: Hidden size of the base model.
        roles: Roles of the base model's tokens; None where no text is read.

    Raises:
        IntegrityError: The statistics of the packs are not comparable.
        IncompatibleError: Packs of two editions of the router cannot be routed together.
    """
    parts = one_edition(packs, width)
    _check_same_features(parts)
    temperatures = joint_temperatures(parts[1:] or parts[:1])
    if min(part.first_layer for part in parts) < parts[0].feature_layer:
        temperatures = replace(temperatures, hidden=0.0)
    statistics = [part.statistics for part in parts]
    return DomainRouter(statistics, prior=priors, temperatures=temperatures, width=width, roles=roles)


def joint_temperatures(packs: Sequence[Routable]) -> Temperatures:
    """Return the mean temperatures of several domains of one edition, independent of their order.

    Those of tokens and half-lives are geometric means.
    """
    if not packs:
        return Temperatures()
    each = [pack.temperatures for pack in packs]
    half_lives = [one.half_life for one in each if one.half_life is not None]
    return Temperatures(
        token=_geometric_mean([one.token for one in each]),
        hidden=math.fsum(one.hidden for one in each) / len(each),
        ridge=math.fsum(one.ridge for one in each) / len(each),
        half_life=_geometric_mean(half_lives) if half_lives else None,
        is_weighted=all(one.is_weighted for one in each),
    )


def _geometric_mean(values: Sequence[float]) -> float:
    # equal values stay as they are, to the last bit
    if min(values) == max(values):
        return values[0]
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _stack_banks(plan: Plan, packs: list[DomainPack], base: LoadedBase) -> Stack:
    for slot, pack in zip(plan.slots, packs, strict=True):
        check_fit(pack, base, source=f"{slot.name}@{slot.manifest.version}")
    names = tuple(slot.name for slot in plan.slots)
    return Stack(names=names, banks=tuple(pack.bank for pack in packs), static=plan.static)


def _priors(plan: Plan) -> torch.Tensor:
    return torch.tensor([slot.prior for slot in plan.slots])


def _with_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    model.composition = plan  # type: ignore[assignment]
    return model


def _check_same_features(packs: Sequence[Routable]) -> None:
    """Raise unless all statistics count the same tokens and describe the input of the same layer."""
    expected = _feature_shape(packs[0])
    for pack in packs:
        found = _feature_shape(pack)
        if found != expected:
            raise IntegrityError(
                "The packs cannot be routed together.",
                cause=f"(tokens, features, feature layer) is {found} in one pack and {expected} in another",
            )


def _feature_shape(pack: Routable) -> tuple[int, int, int]:
    return len(pack.statistics.token_counts), len(pack.statistics.feature_sum), pack.feature_layer
