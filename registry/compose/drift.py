"""Measure routing drift: how much the slot gates of older domains' text change when a domain is added.

Frozen experts alone do not prevent forgetting: a router that sends old text to the new domain loses it just as well.
The slot gates on each older domain's typical text (its expected evidence, computed from statistics) are compared before
and after the addition.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...adapters.composition import GENERAL
from ...adapters.router.router import DomainRouter, typical_gates
from ..pack.pack import Routable
from .build import build_router
from .plan import prior_shares

MIN_GATE = 1e-9  # avoids log(0)
NEW_SLOT = "+"  # placeholder for the new domain's name, which no domain can have


@dataclass(frozen=True)
class Drift:
    """Change of the routing of older domains; all zero for the first domain."""

    mean_kl: float  # nats: KL(before || after) over the slots that exist in both
    top1_flips: int  # number of older domains whose typical text now has another largest slot gate
    newcomer_share: float  # largest slot gate of the new domain on an older domain's text
    domains: int  # number of older domains


def measure_drift(
    preservation: Routable,
    others: Mapping[str, Routable],
    new: Routable,
    *,
    width: int,
    parent: Routable | None = None,
) -> Drift:
    """Compare the router of {KP, older domains} with that of {KP, older domains, new}.

    Args:
        preservation: The KP bank's pack.
        others: Packs of the older domains by name.
        new: Pack of the new domain.
        width: Hidden size of the base model.
        parent: The version that `new` replaces, which then is part of the router before.
    """
    if not others:
        return Drift(0.0, 0, 0.0, 0)
    texts = [pack.statistics for pack in (preservation, *(others[name] for name in sorted(others)))]
    before, after = (
        typical_gates(usual_router(preservation, others, pack, width=width), texts) for pack in (parent, new)
    )
    after_old = after[:, : before.shape[1]].clamp(min=MIN_GATE)
    divergence = (before * (before.clamp(min=MIN_GATE).log() - after_old.log())).sum(1)
    # never negative in exact arithmetic; rounding in float64 can make it so
    mean_kl = max(0.0, round(divergence.mean().item(), 6))
    flips = int((before.argmax(1) != after.argmax(1)).sum())
    return Drift(mean_kl, flips, round(after[:, -1].max().item(), 6), len(others))


def usual_router(
    preservation: Routable, others: Mapping[str, Routable], last: Routable | None, *, width: int
) -> DomainRouter:
    """Return the router of KP, older domains by name, and `last` if there is one, under the usual prior."""
    packs = [preservation, *(others[name] for name in sorted(others)), *([] if last is None else [last])]
    names = [GENERAL, *sorted(others), *([] if last is None else [NEW_SLOT])]
    return build_router(packs, torch.tensor(list(prior_shares(dict.fromkeys(names)).values())), width=width)
