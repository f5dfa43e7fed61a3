"""DomainRouter: causal slot gates in closed form from additive statistics, exact under removal and in any order.

At position t each slot has

    evidence  =  sum over tokens up to t of token evidence  +  hidden-state evidence of the mean feature up to t

and the slot gate is taken in two steps: KP against the strongest domain, then the domains among themselves,

    gate[KP]      = sigmoid(log odds of KP's prior + evidence[KP] - max over domains of (evidence + log weight))
    gate[domain]  = (1 - gate[KP]) * softmax over domains of (evidence + log weight)

with weights relative to the largest. So the gate of KP does not depend on the number of composed domains: ten unrelated
domains take no more from it than one.

*Token evidence* is naive Bayes: log P(token | slot) - log P(token | background), each slot's counts smoothed towards
the background (the mean of all slots' distributions); the same of hashed pairs of a token and the one before it is
added. *Hidden-state evidence* is linear discriminant analysis on causal means of hidden-state features: with pooled
within-class covariance C and class means mu, row w = C^-1 mu and bias b = -1/2 mu^T C^-1 mu (Fisher 1936; Hastie,
Tibshirani and Friedman, Elements of Statistical Learning, eq. 4.10). Tokens are not independent, so each term is
scaled by its temperature.

The router is computed from additive statistics of the chosen slots only: it does not depend on other stored domains and
has no trained parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ...domains.statistics.statistics import DomainStatistics, feature_projection, hidden_features, pair_buckets

METHOD = 2  # part of cache keys: increased when the same statistics and text give different gates
SMOOTHING = 0.3  # share of the background in each slot; pseudo-counts would favour slots with little text
UNIFORM_SHARE = 0.02  # of the background, so that no token is impossible
RIDGE = 0.01  # of the mean variance, added to the covariance
TYPICAL_TOKENS = 8  # of the typical text on which drift is measured; gates of longer texts saturate and hide it


@dataclass(frozen=True, kw_only=True)
class Temperatures:
    """Scale of each evidence term; saved in the pack, so that it is always routed as in training (docs/log.md)."""

    token: float = 0.4
    hidden: float = 0.4


@dataclass(frozen=True, kw_only=True)
class RouterRows:
    """Parameters of the router in closed form, in float64."""

    token_evidence: Float[Tensor, "vocabulary slots"]
    pair_evidence: Float[Tensor, "buckets slots"]
    rows: Float[Tensor, "slots features"]
    bias: Float[Tensor, " slots"]


def router_rows(statistics: Sequence[DomainStatistics]) -> RouterRows:
    """Return token evidence, discriminant rows and biases of these slots, not yet scaled by the temperatures.

    A new slot appends one entry to each; the others change only through the shared background and covariance. The
    result does not depend on the order in which slots were added.
    """
    means = torch.stack([s.feature_mean for s in statistics])  # (slots, features)
    scatter = torch.stack(
        [s.feature_outer - s.rows * torch.outer(m, m) for s, m in zip(statistics, means, strict=True)]
    )
    covariance = scatter.sum(0) / max(sum(s.rows for s in statistics), 1.0)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    covariance = covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
    rows = torch.linalg.solve(covariance, means.T).T
    return RouterRows(
        token_evidence=_evidence([s.token_counts for s in statistics]),
        pair_evidence=_evidence([s.pair_counts for s in statistics]),
        rows=rows,
        bias=-0.5 * (means * rows).sum(1),
    )


def _evidence(slots: Sequence[Int64[Tensor, " kinds"]]) -> Float[Tensor, "kinds slots"]:
    """Return log P(kind | slot) - log P(kind | background) from counts, in float64."""
    counts = torch.stack(list(slots), dim=1).double()
    totals = counts.sum(0).clamp(min=1)
    background = (counts / totals).mean(1, keepdim=True)
    background = (1 - UNIFORM_SHARE) * background + UNIFORM_SHARE / len(counts)
    smoothed = (1 - SMOOTHING) * counts / totals + SMOOTHING * background
    return smoothed.log() - background.log()


class DomainRouter(nn.Module):
    """Router of one composition. Its running state is one small vector of sums for each sequence."""

    token_evidence: Tensor
    pair_evidence: Tensor
    rows: Tensor
    feature_rows: Tensor
    bias: Tensor
    log_odds: Tensor
    log_weight: Tensor

    def __init__(
        self,
        statistics: Sequence[DomainStatistics],
        *,
        prior: Float[Tensor, " slots"],
        temperatures: Temperatures,
        width: int,
    ):
        """Compute the router from statistics.

        Args:
            statistics: One for each slot, KP first.
            prior: Non-negative weights of the slots; need not sum to 1.
            temperatures: Temperatures of the two evidence terms.
            width: Hidden size of the base model.
        """
        super().__init__()
        closed = router_rows(statistics)
        projection = feature_projection(width)
        rows = closed.rows if projection is None else closed.rows @ projection.double()
        self.slots = len(statistics)
        self.register_buffer("token_evidence", (temperatures.token * closed.token_evidence).float(), persistent=False)
        self.register_buffer("pair_evidence", (temperatures.token * closed.pair_evidence).float(), persistent=False)
        self.register_buffer("rows", (temperatures.hidden * rows).float(), persistent=False)
        self.register_buffer("feature_rows", (temperatures.hidden * closed.rows).float(), persistent=False)
        self.register_buffer("bias", (temperatures.hidden * closed.bias).float(), persistent=False)
        self.register_buffer("log_odds", (prior[:1] / prior[1:].sum()).log().float(), persistent=False)
        # if no domain has any weight, KP takes everything and this value does not matter
        weight = prior[1:] / prior[1:].max() if prior[1:].any() else torch.ones_like(prior[1:])
        self.register_buffer("log_weight", weight.log().float(), persistent=False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "DomainRouter":
        """Rebuild a router from the result of `tensors`."""
        router = cls.__new__(cls)
        nn.Module.__init__(router)
        router.slots = len(tensors["bias"])
        for name, tensor in tensors.items():
            router.register_buffer(name, tensor, persistent=False)
        return router

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the router, by name."""
        return dict(self.named_buffers())

    def increments(
        self,
        input_ids: Int64[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq width"],
        mask: Bool[Tensor, "batch seq"],
        last: Int64[Tensor, "batch later"] | None = None,  # `last_tokens`; None: of this text alone
    ) -> Float[Tensor, "batch seq sums"]:
        """Return what each position adds to the sums: token evidence and feature scores by slot, and a count of 1."""
        # the projection is folded into the rows
        unit = hidden_features(hidden, None)
        last = last_tokens(input_ids, mask, None) if last is None else last
        tokens = F.embedding(input_ids, self.token_evidence) + self._pair_evidence(input_ids, last)
        return torch.cat([tokens, unit @ self.rows.T, torch.ones_like(unit[..., :1])], dim=-1) * mask.unsqueeze(-1)

    def _pair_evidence(
        self, ids: Int64[Tensor, "batch seq"], last: Int64[Tensor, "batch later"]
    ) -> Float[Tensor, "batch seq slots"]:
        earlier = last[:, :-1]
        found = F.embedding(pair_buckets(earlier.clamp(min=0), ids), self.pair_evidence)
        return found * (earlier >= 0).unsqueeze(-1)

    def slot_gates(self, sums: Float[Tensor, "batch seq sums"]) -> Float[Tensor, "batch seq slots"]:
        """Return the gates of KP and the domains, given the sums up to each position."""
        tokens, scores, count = sums.split([self.slots, self.slots, 1], dim=-1)
        # before the first real token there is no evidence: the prior alone decides
        hidden = torch.where(count > 0, scores / count.clamp(min=1) + self.bias, 0.0)
        evidence = tokens + hidden
        if self.slots == 1:
            return torch.ones_like(evidence)
        domains = evidence[..., 1:] + self.log_weight
        kp = torch.sigmoid(self.log_odds + evidence[..., :1] - domains.amax(-1, keepdim=True))
        return torch.cat([kp, (1 - kp) * torch.softmax(domains, dim=-1)], dim=-1)

    def text_gates(
        self,
        input_ids: Int64[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq width"],
        mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq slots"]:
        """Return the causal gates of texts that are read alone."""
        return self.slot_gates(self.increments(input_ids, hidden, mask).cumsum(1))


def last_tokens(
    ids: Int64[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], before: Int64[Tensor, " batch"] | None
) -> Int64[Tensor, "batch later"]:
    """Return the last text token before each position, and in one more column that of the end; -1 if there is none.

    Padding is skipped on either side.
    """
    first = torch.full_like(ids[:, :1], -1) if before is None else before[:, None]
    if ids.shape[1] == 1:  # decoding, with a third of the operators
        return torch.cat([first, torch.where(mask, ids, first)], dim=1)
    known = torch.cat([first, ids], dim=1)
    positions = torch.arange(known.shape[1], device=ids.device)
    is_real = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    return known.gather(1, torch.where(is_real, positions, 0).cummax(1).values)


@torch.inference_mode()
def typical_gates(router: DomainRouter, statistics: Sequence[DomainStatistics]) -> Float[Tensor, "texts slots"]:
    """Return the slot gates of a typical text of each domain: those of its expected evidence after `TYPICAL_TOKENS`.

    Computed from statistics alone, so that routing before and after adding a domain can be compared without any text.
    """
    sums = []
    for one in statistics:
        tokens = TYPICAL_TOKENS * (
            _shares(one.token_counts, router.token_evidence) @ router.token_evidence
            + _shares(one.pair_counts, router.pair_evidence) @ router.pair_evidence
        )
        mean = one.feature_mean.float().to(tokens.device)
        sums.append(torch.cat([tokens, mean @ router.feature_rows.T, torch.ones_like(tokens[:1])]))
    return router.slot_gates(torch.stack(sums).unsqueeze(0))[0]


def _shares(counts: Int64[Tensor, " kinds"], like: Tensor) -> Float[Tensor, " kinds"]:
    return (counts.float() / counts.sum().clamp(min=1)).to(like.device)


def whole_prompts(
    gates: Float[Tensor, "batch seq slots"], ends: Int64[Tensor, "batch #seq"]
) -> Float[Tensor, "batch seq slots"]:
    """Return gates in which each position of a prompt has those of the prompt's last position.

    Args:
        gates: Causal gates.
        ends: Last position of each prompt, left padding counted; one for each row, or for each position of packed rows.
    """
    positions = torch.arange(gates.shape[1], device=gates.device)
    source = torch.maximum(positions, ends.to(gates.device))
    return gates.gather(1, source[..., None].expand_as(gates))
