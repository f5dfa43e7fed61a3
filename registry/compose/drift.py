"""Routing drift: how much the router's gates on older domains' texts change when a domain is added.

Frozen experts are not enough: a router that sends old text elsewhere forgets as surely as one whose experts changed.
Gates are compared on each older domain's typical text (its expected evidence, computed from statistics), before and
after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...adapters.composition import GENERAL
from ...adapters.router.router import typical_gates
from ..pack.pack import Routable
from .build import build_router
from .plan import prior_shares

FLOOR = 1e-9
NEWCOMER = "+"  # stands for the new domain; not a name that any domain can have


@dataclass(frozen=True)
class Drift:
    """How routing of the older domains changed; all zero for the first domain."""

    mean_kl: float  # nats: KL(before || after) over the slots that were there before
    top1_flips: int  # older domains whose typical text now goes to another slot
    newcomer_share: float  # the largest gate that an older domain's text gives to the new one
    domains: int  # how many older domains were compared


def measure_drift(
    preservation: Routable,
    others: Mapping[str, Routable],
    new: Routable,
    *,
    width: int,
    parent: Routable | None = None,
) -> Drift:
    """Compares the router of {KP, older domains} with that of {KP, older domains, new}.

    Args:
        parent: The version in whose place the new one comes, which is in the router before.
    """
    if not others:
        return Drift(0.0, 0, 0.0, 0)
    names = sorted(others)
    old_packs = [preservation, *(others[name] for name in names)]
    texts = [pack.statistics for pack in old_packs]
    after = _gates([*old_packs, new], [*names, NEWCOMER], texts, width)
    if parent is None:
        before = _gates(old_packs, names, texts, width)
    else:
        before = _gates([*old_packs, parent], [*names, NEWCOMER], texts, width)
    kept = after[:, : before.shape[1]].clamp(min=FLOOR)
    divergence = (before * (before.clamp(min=FLOOR).log() - kept.log())).sum(1)
    # it cannot be negative; rounding in float64 can make it so
    mean_kl = max(0.0, round(divergence.mean().item(), 6))
    flips = int((before.argmax(1) != after.argmax(1)).sum())
    return Drift(mean_kl, flips, round(after[:, -1].max().item(), 6), len(names))


def _gates(packs: Sequence[Routable], names: list[str], texts: list, width: int) -> torch.Tensor:
    shares = prior_shares(dict.fromkeys([GENERAL, *names]))
    router = build_router(packs, torch.tensor(list(shares.values())), width=width)
    return typical_gates(router, texts)
