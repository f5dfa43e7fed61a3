"""Plan a composition: resolve its versions and priors from manifests, without torch and without reading tensors.

The cost of planning depends on the packs that are composed, not on the number of packs in the store.
"""

import math
from dataclasses import dataclass

from ...adapters.composition import GENERAL, Composition
from ...domains.errors import InputError, IntegrityError, NotFoundError
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.store import Store
from .notebook import html_table

KP_PRIOR = 0.6  # KP's share of the prior: an empty prompt and unknown text behave like base + KP (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One slot of a planned composition."""

    manifest: PackManifest
    prior: float  # slot gate before any evidence, or the constant slot gate of a static composition

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.manifest.name

    @property
    def ranks_per_layer(self) -> tuple[int, ...]:
        """Sum of the ranks of this slot's experts in each decoder layer."""
        ranks = [0] * len(self.manifest.allocation["counts"])
        for expert in self.manifest.experts:
            for layer in expert.layers:
                ranks[layer] += expert.rank
        return tuple(ranks)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resolved composition: slots with their versions and priors. A composed model has it as `model.composition`."""

    composition: Composition
    slots: tuple[Slot, ...]  # the KP slot first
    static: bool

    def __post_init__(self) -> None:
        depths = {slot.name: len(slot.manifest.allocation["counts"]) for slot in self.slots}
        if len(set(depths.values())) > 1:
            listed = ", ".join(f"{name} {depth}" for name, depth in depths.items())
            raise IntegrityError("These packs are for models of different depth.", cause=f"decoder layers: {listed}")
        unrouted = [slot.name for slot in self.slots if not slot.manifest.is_routed]
        if unrouted and not self.static:
            raise InputError(
                f"{self.composition} cannot be routed.",
                cause=f"imported without text, by which the router would know it: {', '.join(unrouted)}",
                fix=f"give constant weights: registry compose {self.composition} --static (weights: NAME:0.5); "
                "leave it out; or import the adapter under another name with --data FILE",
            )

    @property
    def pinned(self) -> str:
        """The composition with the version of every slot."""
        return "+".join(f"{slot.name}@{slot.manifest.version}" for slot in self.slots)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Number of experts of all slots in each decoder layer."""
        counts = [slot.manifest.allocation["counts"] for slot in self.slots]
        return tuple(sum(layer) for layer in zip(*counts, strict=True))

    @property
    def ranks_per_layer(self) -> tuple[int, ...]:
        """Length of the rank axis in each decoder layer."""
        return tuple(sum(layer) for layer in zip(*(slot.ranks_per_layer for slot in self.slots), strict=True))

    @property
    def parameters(self) -> int:
        """Number of expert parameters of all slots."""
        return sum(expert.parameters for slot in self.slots for expert in slot.manifest.experts)

    def __repr__(self) -> str:
        slots = ", ".join(f"{slot.name}@{slot.manifest.version}: {slot.prior:.3g}" for slot in self.slots)
        kind = "static" if self.static else "routed"
        return f"Plan({str(self.composition)!r}, {kind}, slots={{{slots}}}, parameters={self.parameters:_})"

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [
            (
                slot.name,
                slot.manifest.version,
                f"{slot.prior:.3g}",
                _per_layer(slot.manifest.allocation["counts"]),
                _per_layer(slot.ranks_per_layer),
                f"{sum(expert.parameters for expert in slot.manifest.experts):,}",
            )
            for slot in self.slots
        ]
        layers = _per_layer(self.experts_per_layer), _per_layer(self.ranks_per_layer)
        rows.append(("all slots", "", "", *layers, f"{self.parameters:,}"))
        prior = "constant gate" if self.static else "prior"
        headings = ("slot", "version", prior, "experts per layer", "ranks per layer", "parameters")
        return html_table(f"{'Static' if self.static else 'Routed'} composition {self.composition}", headings, rows)


def plan_composition(store: Store, text: str, *, base: BaseRecord, static: bool = False) -> Plan:
    """Resolve a composition against a store.

    Raises:
        InputError: `text` violates the grammar, or names a domain without text and is not static.
        NotFoundError: A domain, version or alias does not exist, or the KP bank is missing.
        IncompatibleError: A pack belongs to another base model.
    """
    composition = Composition.parse(text)
    manifests = [_general_manifest(store, composition)]
    manifests += [store.manifest(term.name, term.selector) for term in composition.terms if term.name != GENERAL]
    for manifest in manifests:
        check_same_base(wanted=manifest.base, found=base, what=f"{manifest.name}@{manifest.version}")
    weights = {term.name: term.weight for term in composition.terms}
    priors = constant_gates(weights) if static else prior_shares(weights)
    slots = tuple(Slot(manifest=m, prior=priors[m.name]) for m in manifests)
    return Plan(composition=composition, slots=slots, static=static)


def prior_shares(weights: dict[str, float | None]) -> dict[str, float]:
    """Return the prior of each slot, which sum to 1.

    KP has `KP_PRIOR` unless it has a weight; domains share the rest in proportion to their weights (default 1).

    Raises:
        InputError: The weights are too large to add up.
    """
    domains = {name: 1.0 if weight is None else weight for name, weight in weights.items() if name != GENERAL}
    total = sum(domains.values())
    general = weights.get(GENERAL) or total * KP_PRIOR / (1 - KP_PRIOR) or 1.0
    whole = total + general
    if not math.isfinite(whole):
        raise InputError(
            "The weights of a composition are too large to add up.",
            cause=f"the largest is {max(weight or 0.0 for weight in weights.values()):g}",
            fix="only their ratios count: medicine:2+legal:1",
        )
    return {GENERAL: general / whole} | {name: weight / whole for name, weight in domains.items()}


def constant_gates(weights: dict[str, float | None]) -> dict[str, float]:
    """Return the slot gates of a static composition: the weights, or an equal share of what they leave of 1.

    KP's gate is 0 unless it is named.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    unweighted = [name for name, weight in weights.items() if weight is None]
    rest = max(0.0, 1.0 - math.fsum(given.values())) / len(unweighted) if unweighted else 0.0
    return {GENERAL: 0.0} | {name: given.get(name, rest) for name in weights}


def _general_manifest(store: Store, composition: Composition) -> PackManifest:
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


def _per_layer(values: tuple[int, ...] | list[int]) -> str:
    """Join values, with runs of equal ones shortened.

    >>> _per_layer([0, 2, 2, 2, 4])
    '0, 3 x 2, 4'
    """
    runs: list[tuple[int, int]] = []  # length, value
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1] = (runs[-1][0] + 1, value)
        else:
            runs.append((1, value))
    return ", ".join(f"{length} x {value}" if length > 1 else str(value) for length, value in runs)
