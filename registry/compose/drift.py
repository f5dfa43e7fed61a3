"""Measure routing drift: how much the slot gates of older domains' text change when a domain is added.

Frozen experts alone do not prevent forgetting: a router that sends old text to the new domain loses it just as well.
The slot gates on each older domain's typical text (its expected evidence, computed from statistics) are compared before
and after the addition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...adapters.composition import GENERAL
from ...adapters.router.router import DomainRouter, typical_gates
from ...domains.statistics.token_roles import TokenRoles
from ..pack.pack import Routable, RoutingData, one_edition
from .build import build_router
from .plan import prior_shares

MIN_GATE = 1e-9  # avoids log(0)


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
    roles: TokenRoles | None = None,
) -> Drift:
    """Compare the router of {KP, older domains} with that of {KP, older domains, new}.

    Args:
        preservation: The KP bank's pack.
        others: Packs of the older domains by name.
        new: Pack of the new domain.
        width: Hidden size of the base model.
        parent: The version that `new` replaces, which then is part of the router before.
        roles: Roles of the base model's tokens.
    """
    if not others:
        return Drift(0.0, 0, 0.0, 0)
    older, news = alike(preservation, others, [new, parent], width=width)
    texts = [part.statistics for part in older]
    before, after = (
        typical_gates(usual_router(older, part, width=width, roles=roles), texts) for part in (news[1], news[0])
    )
    after_old = after[:, : before.shape[1]].clamp(min=MIN_GATE)
    divergence = (before * (before.clamp(min=MIN_GATE).log() - after_old.log())).sum(1)
    # never negative in exact arithmetic; rounding in float64 can make it so
    mean_kl = max(0.0, round(divergence.mean().item(), 6))
    flips = int((before.argmax(1) != after.argmax(1)).sum())
    return Drift(mean_kl, flips, round(after[:, -1].max().item(), 6), len(others))


def alike(
    preservation: Routable, others: Mapping[str, Routable], news: Sequence[Routable | None], *, width: int
) -> tuple[list[RoutingData], list[RoutingData | None]]:
    """Return KP and the older domains, sorted by name, and the new ones, all of one edition of the router."""
    older = [preservation, *(others[name] for name in sorted(others))]
    given = [one for one in news if one is not None]
    parts = one_edition([*older, *given], width)
    rest = iter(parts[len(older) :])
    return parts[: len(older)], [None if one is None else next(rest) for one in news]


def usual_router(
    older: Sequence[RoutingData], last: RoutingData | None, *, width: int, roles: TokenRoles | None = None
) -> DomainRouter:
    """Return the router of KP, older domains and `last`, if there is one, under the usual prior.

    Args:
        older: KP and the older domains.
        last: The newcomer.
        width: Hidden size of the base model.
        roles: Roles of the base model's tokens.
    """
    packs = [*older, *([] if last is None else [last])]
    names = [GENERAL, *map(str, range(1, len(packs)))]
    priors = torch.tensor(list(prior_shares(dict.fromkeys(names)).values()))
    return build_router(packs, priors, width=width, roles=roles)
