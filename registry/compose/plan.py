"""From a composition's text to a model: resolve versions, verify, stack, attach.

The plan of a composition needs manifests only; the model needs the packs it names and nothing else, so its cost depends
on what is composed, never on what is stored.
"""

import math
from dataclasses import dataclass

from ...adapters.composition import GENERAL, Composition
from ...domains.errors import IntegrityError, NotFoundError
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.store import Store

KP_PRIOR = 0.6  # KP's share of the prior: an empty prompt and unknown text behave like base + KP (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One slot of a planned composition."""

    manifest: PackManifest
    prior: float  # share of the slot gate before any evidence, or the fixed gate of a static composition

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.manifest.name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a composition will be: slots with versions, and the base they all belong to."""

    composition: Composition
    slots: tuple[Slot, ...]  # the KP slot first
    static: bool

    def __post_init__(self) -> None:
        depths = {slot.name: len(slot.manifest.allocation["counts"]) for slot in self.slots}
        if len(set(depths.values())) > 1:
            listed = ", ".join(f"{name} {depth}" for name, depth in depths.items())
            raise IntegrityError("These packs are for models of different depth.", cause=f"decoder layers: {listed}")

    @property
    def pinned(self) -> str:
        """The composition with every version spelled out."""
        return "+".join(f"{slot.name}@{slot.manifest.version}" for slot in self.slots)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Experts of all slots in each decoder layer."""
        counts = [slot.manifest.allocation["counts"] for slot in self.slots]
        return tuple(sum(layer) for layer in zip(*counts, strict=True))

    @property
    def ranks_per_layer(self) -> tuple[int, ...]:
        """Length of the rank axis in each decoder layer."""
        depth = len(self.experts_per_layer)
        ranks = [0] * depth
        for slot in self.slots:
            for expert in slot.manifest.experts:
                for layer in expert.layers:
                    ranks[layer] += expert.rank
        return tuple(ranks)

    @property
    def parameters(self) -> int:
        """Expert parameters of all slots."""
        return sum(expert.parameters for slot in self.slots for expert in slot.manifest.experts)


def plan_composition(store: Store, text: str, *, base: BaseRecord, static: bool = False) -> Plan:
    """Resolves a composition against a store.

    Raises:
        InputError: The text breaks the grammar.
        NotFoundError: A domain, version or alias does not exist, or there is no KP bank yet.
        IncompatibleError: A pack belongs to another base model.
    """
    composition = Composition.parse(text)
    manifests = [_general(store, composition)]
    manifests += [store.manifest(term.name, term.selector) for term in composition.terms if term.name != GENERAL]
    for manifest in manifests:
        check_same_base(wanted=manifest.base, found=base, what=f"{manifest.name}@{manifest.version}")
    weights = {term.name: term.weight for term in composition.terms}
    shares = fixed_shares(weights) if static else prior_shares(weights)
    slots = tuple(Slot(manifest=m, prior=shares[m.name]) for m in manifests)
    return Plan(composition=composition, slots=slots, static=static)


def prior_shares(weights: dict[str, float | None]) -> dict[str, float]:
    """The prior of each slot: KP has `KP_PRIOR` unless it is weighted; domains share the rest by weight."""
    domains = {name: 1.0 if weight is None else weight for name, weight in weights.items() if name != GENERAL}
    total = sum(domains.values())
    general = weights.get(GENERAL) or total * KP_PRIOR / (1 - KP_PRIOR) or 1.0
    whole = total + general
    return {GENERAL: general / whole} | {name: weight / whole for name, weight in domains.items()}


def fixed_shares(weights: dict[str, float | None]) -> dict[str, float]:
    """The constant slot gates: the weights as given; slots without a weight share what is left to 1 alike.

    KP gets none of it unless it is named.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    unnamed = [name for name, weight in weights.items() if weight is None]
    rest = max(0.0, 1.0 - math.fsum(given.values())) / len(unnamed) if unnamed else 0.0
    return {GENERAL: 0.0} | {name: given.get(name, rest) for name in weights}


def _general(store: Store, composition: Composition) -> PackManifest:
    selector: str | None = next((term.selector for term in composition.terms if term.name == GENERAL), None)
    try:
        return store.manifest(GENERAL, selector)
    except NotFoundError as error:
        if store.versions(GENERAL):
            raise
        raise NotFoundError(
            "This registry has no KP bank yet.",
            cause="init was interrupted before the knowledge-preservation bank was stored",
            fix="run registry init again; it resumes",
        ) from error
