"""DomainRouter: causal slot gates in closed form from additive statistics, exact under removal and in any order.

At position t each slot has

    evidence  =  token evidence  +  hidden-state evidence

of the text up to t, where earlier text fades (fading.py), and the slot gate is taken in two steps: KP against the
strongest domain, then the domains among themselves,

    gate[KP]      = sigmoid(log odds of KP's prior + evidence[KP] - max over domains of (evidence + log weight))
    gate[domain]  = (1 - gate[KP]) * softmax over domains of (evidence + ridge evidence + log weight)

with weights relative to the largest. So the gate of KP does not depend on the number of composed domains: ten unrelated
domains take no more from it than one.

*Token evidence* is naive Bayes over tokens and pairs of tokens, summed over the text (evidence.py). *Hidden-state
evidence* is linear discriminant analysis on the mean of hidden-state features, in which common tokens weigh little
(token_roles.py): with within-class covariance C, the mean of the slots' covariances, and class means mu, row
w = C^-1 mu and bias b = -1/2 mu^T C^-1 mu (Fisher 1936; Hastie, Tibshirani and Friedman, Elements of Statistical
Learning, eq. 4.10). *Ridge evidence* is a regression on hashed token features (ridge.py), divided by the root of the
number of tokens; between general text and a domain it would learn how texts are worded rather than what they are about,
so it only tells domains apart. Tokens are not independent, so each term is scaled by its temperature.

Tokens of the chat template and padding carry no evidence, and nothing fades at them.

The router is computed from additive statistics of the chosen slots only: it does not depend on other stored domains and
has no trained parameters.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ...domains.statistics.fading import HALF_LIFE, faded_sums, fading_steps, tail_steps
from ...domains.statistics.hashing import HASHED, PAIR_BUCKETS, feature_projection, pair_buckets, signed_places
from ...domains.statistics.measure import hidden_features
from ...domains.statistics.statistics import DomainStatistics, first_projection
from ...domains.statistics.token_roles import NEUTRAL, TokenRoles, ends_of_sentences
from .evidence import expected_evidence, look_up, sparse_evidence
from .ridge import ridge_weights

METHOD = 4  # part of cache keys: increased when the same statistics and text give different gates
RIDGE = 0.01  # of the mean variance, added to the covariance
LEAST_COUNT = 1e-6  # avoids division by 0; less is left of a text only after many ends of sentences
TYPICAL_TOKENS = 8  # of the typical text on which drift is measured; gates of longer texts saturate and hide it


@dataclass(frozen=True, kw_only=True)
class Temperatures:
    """Scale of each evidence term; saved in the pack, so that it is always routed as in training (docs/log.md)."""

    token: float = 0.6
    hidden: float = 0.8
    ridge: float = 0.2
    half_life: float | None = HALF_LIFE  # tokens after which evidence counts half; None in the first edition
    is_weighted: bool = True  # whether the features of common tokens weigh less; not in older packs

    @property
    def is_first_edition(self) -> bool:
        """Whether evidence does not fade, and tokens of the chat template count as text."""
        return self.half_life is None


FIRST_EDITION = Temperatures(token=0.4, hidden=0.4, ridge=0.0, half_life=None, is_weighted=False)


@dataclass(frozen=True, kw_only=True)
class DiscriminantRows:
    """Linear discriminants of the slots' features, in float64."""

    rows: Float[Tensor, "slots features"]
    bias: Float[Tensor, " slots"]


def discriminant_rows(statistics: Sequence[DomainStatistics], *, pooled: bool = False) -> DiscriminantRows:
    """Return discriminant rows and biases of these slots, not yet scaled by the temperature.

    A new slot appends one entry to each; the others change only through the shared covariance. The result does not
    depend on the order in which slots were added, up to rounding.

    Args:
        statistics: One for each slot.
        pooled: Weight each slot's covariance by its rows, as in the first edition: general text, the most, then says
            how the short prompts of a small domain vary.
    """
    means = torch.stack([s.feature_mean for s in statistics])  # (slots, features)
    rows = torch.tensor([one.rows for one in statistics], dtype=torch.float64)
    weights = torch.ones_like(rows) if pooled else 1 / rows.clamp(min=1)
    covariance = -(means.T * (weights * rows)) @ means
    for one, weight in zip(statistics, weights.tolist(), strict=True):
        covariance.add_(one.feature_outer, alpha=weight)
    covariance /= (weights * rows).sum().clamp(min=1)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(ridge)
    discriminants = torch.linalg.solve(covariance, means.T).T
    return DiscriminantRows(rows=discriminants, bias=-0.5 * (means * discriminants).sum(1))


class DomainRouter(nn.Module):
    """Router of one composition. Its running state is one small vector of sums for each sequence."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    ridge: Tensor
    rows: Tensor
    feature_rows: Tensor
    bias: Tensor
    log_odds: Tensor
    log_weight: Tensor
    step: Tensor
    flags: Tensor
    weights: Tensor
    places: Tensor

    def __init__(
        self,
        statistics: Sequence[DomainStatistics],
        *,
        prior: Float[Tensor, " slots"],
        temperatures: Temperatures,
        width: int,
        roles: TokenRoles | None = None,
    ):
        """Compute the router from statistics.

        Args:
            statistics: One for each slot, KP first; all of one edition.
            prior: Non-negative weights of the slots; need not sum to 1.
            temperatures: Temperatures of the evidence terms.
            width: Hidden size of the base model.
            roles: Roles of the base model's tokens; None if all are ordinary text.
        """
        super().__init__()
        vocabulary = len(statistics[0].token_counts)
        closed = discriminant_rows(statistics, pooled=temperatures.is_first_edition)
        table = sparse_evidence(
            [[s.token_counts for s in statistics], [s.pair_counts for s in statistics]],
            scale=temperatures.token,
            requests=None if roles is None or temperatures.is_first_edition else roles.requests,
        )
        hashed = [s.hashed for s in statistics if s.hashed is not None]
        has_ridge = temperatures.ridge > 0 and len(hashed) == len(statistics)
        ridge = temperatures.ridge * ridge_weights(hashed) if has_ridge else torch.zeros(0, len(statistics))
        project = first_projection if temperatures.is_first_edition else feature_projection
        projection = project(width)
        rows = closed.rows if projection is None else closed.rows @ projection.double()
        ignores_roles = roles is None or temperatures.is_first_edition
        flags = torch.zeros(vocabulary, dtype=torch.uint8) if roles is None or ignores_roles else roles.flags
        weights = roles.weights if roles is not None and temperatures.is_weighted else None
        # if no domain has any weight, KP takes everything and this value does not matter
        weight = prior[1:] / prior[1:].max() if prior[1:].any() else torch.ones_like(prior[1:])
        self._register(
            {
                **table,
                "ridge": torch.cat([ridge, -ridge, ridge[:1] * 0]) if has_ridge else ridge,
                "rows": (temperatures.hidden * rows).float(),
                # for features that are projected already, where they are
                "feature_rows": (temperatures.hidden * closed.rows[: 0 if projection is None else None]).float(),
                "bias": (temperatures.hidden * closed.bias).float(),
                "log_odds": (prior[:1] / prior[1:].sum()).log().float(),
                "log_weight": weight.log().float(),
                "step": torch.tensor([0.0 if temperatures.half_life is None else 1 / temperatures.half_life]),
                "flags": flags,
                "weights": torch.ones(vocabulary) if weights is None else weights,
            }
        )

    def _register(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.slots, self.vocabulary = len(self.bias), len(self.flags)
        self.has_ridge = len(self.ridge) > 0
        self.sums = self.slots * (3 if self.has_ridge else 2) + 2
        self.most = int(self.starts.diff().max().clamp(min=1))
        places = signed_places(self.vocabulary) if self.has_ridge else torch.zeros(0, dtype=torch.int16)
        # the last kind, where there is no pair, has the last row, which is empty
        places = torch.cat([places, places.new_full((1,), 2 * HASHED)])
        self.register_buffer("places", places, persistent=False)
        parts = (self.log_odds, self.log_weight, self.bias, self.rows, self.step, self.weights)
        self.identity = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "DomainRouter":
        """Rebuild a router from the result of `tensors`."""
        router = cls.__new__(cls)
        nn.Module.__init__(router)
        router._register(tensors)
        return router

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the router, by name."""
        return {name: tensor for name, tensor in self.named_buffers() if name != "places"}

    def text_mask(
        self, ids: Int64[Tensor, "batch seq"], is_real: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch seq"]:
        """Return which positions carry evidence: neither padding nor tokens of the chat template."""
        return is_real & ((self.flags[ids] & NEUTRAL) == 0)

    def steps(
        self,
        ids: Int64[Tensor, "batch seq"],
        is_text: Bool[Tensor, "batch seq"],
        *,
        starts: Bool[Tensor, "batch seq"] | None = None,
        prompt_ends: Int64[Tensor, "batch #seq"] | None = None,
    ) -> Float[Tensor, "batch seq"]:
        """Return how far earlier sums fade at each position.

        Args:
            ids: Token ids.
            is_text: Result of `text_mask`.
            starts: True where another text begins in the same row.
            prompt_ends: Last positions of prompts that are read as a whole.
        """
        steps = fading_steps(is_text, self.step, starts=starts)
        if prompt_ends is None:
            return steps
        return steps + tail_steps(is_text, ends_of_sentences(self.flags[ids]), prompt_ends)

    def increments(
        self,
        ids: Int64[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq width"],
        is_text: Bool[Tensor, "batch seq"],
        last: Int64[Tensor, "batch later"] | None = None,  # `last_tokens`; None: of this text alone
    ) -> Float[Tensor, "batch seq sums"]:
        """Return what each position adds to the sums: evidence and scores by slot, its weight, and a count of 1."""
        last = last_tokens(ids, is_text, None) if last is None else last
        earlier, none = last[:, :-1], self.vocabulary + PAIR_BUCKETS
        pairs = self.vocabulary + pair_buckets(earlier.clamp(min=0), ids)
        kinds = torch.stack([ids, torch.where(earlier >= 0, pairs, none)], dim=-1)
        kinds = torch.where(is_text[..., None], kinds, none)
        table = {"starts": self.starts, "columns": self.columns, "values": self.values}
        found = [look_up(table, kinds, slots=self.slots, most=self.most)]
        weights = self.weights[ids][..., None]
        # the projection is folded into the rows
        found.append(weights * (hidden_features(hidden, None) @ self.rows.T))
        if self.has_ridge:
            found.append(self.ridge[self.places[kinds].long()].sum(-2))
        found += [weights, torch.ones_like(weights)]
        # padding may be NaN, which no product with 0 removes
        return torch.where(is_text[..., None], torch.cat(found, dim=-1), 0.0)

    def slot_gates(self, sums: Float[Tensor, "batch seq sums"]) -> Float[Tensor, "batch seq slots"]:
        """Return the gates of KP and the domains, given the sums up to each position."""
        tokens, scores = sums[..., : self.slots], sums[..., self.slots : 2 * self.slots]
        weight, count = sums[..., -2:-1], sums[..., -1:]
        # before the first token of text there is no evidence: the prior alone decides
        hidden = torch.where(count > 0, scores / weight.clamp(min=LEAST_COUNT) + self.bias, 0.0)
        evidence = tokens + hidden
        if self.slots == 1:
            return torch.ones_like(evidence)
        domains = evidence[..., 1:] + self.log_weight
        kp = torch.sigmoid(self.log_odds + evidence[..., :1] - domains.amax(-1, keepdim=True))
        if self.has_ridge:  # among domains only
            domains = domains + sums[..., 2 * self.slots + 1 : -2] * torch.rsqrt(count.clamp(min=LEAST_COUNT))
        return torch.cat([kp, (1 - kp) * torch.softmax(domains, dim=-1)], dim=-1)

    @torch.inference_mode()
    def text_gates(
        self,
        ids: Int64[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq width"],
        mask: Bool[Tensor, "batch seq"],
        *,
        as_prompts: bool = False,
    ) -> Float[Tensor, "batch seq slots"]:
        """Return the causal gates of texts, each read alone and outside of a model.

        Args:
            ids: Token ids.
            hidden: Input of the layer whose hidden states the router reads.
            mask: True for text, False for padding.
            as_prompts: Read each text as a prompt, whose last sentence counts most.
        """
        is_text = self.text_mask(ids, mask)
        positions = torch.arange(ids.shape[1], device=ids.device)
        ends = torch.where(mask, positions, 0).amax(1, keepdim=True) if as_prompts else None
        steps = self.steps(ids, is_text, prompt_ends=ends)
        return self.slot_gates(faded_sums(self.increments(ids, hidden, is_text), steps))


def last_tokens(
    ids: Int64[Tensor, "batch seq"],
    is_text: Bool[Tensor, "batch seq"],
    before: Int64[Tensor, " batch"] | None,
    starts: Bool[Tensor, "batch seq"] | None = None,
) -> Int64[Tensor, "batch later"]:
    """Return the last text token before each position, and in one more column that of the end; -1 if there is none.

    Padding and tokens of the chat template are skipped.

    Args:
        ids: Token ids.
        is_text: Result of `DomainRouter.text_mask`.
        before: The last text token before the first position.
        starts: True where another text begins in the same row, which has no token before it.
    """
    first = torch.full_like(ids[:, :1], -1) if before is None else before[:, None]
    if ids.shape[1] == 1:  # decoding, with a third of the operators
        return torch.cat([first, torch.where(is_text, ids, first)], dim=1)
    known = torch.cat([first, torch.where(is_text, ids, -1)], dim=1)
    positions = torch.arange(known.shape[1], device=ids.device)
    is_known = is_text if starts is None else is_text | starts
    is_known = torch.cat([torch.ones_like(is_text[:, :1]), is_known], dim=1)
    last = known.gather(1, torch.where(is_known, positions, 0).cummax(1).values)
    if starts is not None:
        last[:, :-1].masked_fill_(starts, -1)
    return last


@torch.inference_mode()
def typical_gates(router: DomainRouter, statistics: Sequence[DomainStatistics]) -> Float[Tensor, "texts slots"]:
    """Return the slot gates of a typical text of each domain: those of its expected evidence after `TYPICAL_TOKENS`.

    Computed from statistics alone, so that routing before and after adding a domain can be compared without any text.
    """
    table = {"starts": router.starts, "columns": router.columns, "values": router.values}
    rows = router.feature_rows if len(router.feature_rows) else router.rows
    sums = []
    for one in statistics:
        tokens = TYPICAL_TOKENS * (
            expected_evidence(table, _shares(one.token_counts), first=0, slots=router.slots)
            + expected_evidence(table, _shares(one.pair_counts), first=router.vocabulary, slots=router.slots)
        )
        parts = [tokens, TYPICAL_TOKENS * (one.feature_mean.float() @ rows.T)]
        if router.has_ridge:
            assert one.hashed is not None
            # rows are divided by the root of their number of tokens already
            parts.append(TYPICAL_TOKENS**0.5 * (one.hashed.mean @ router.ridge[:HASHED]))
        # feature means are of weighted features already
        sums.append(torch.cat([*parts, torch.full((2,), float(TYPICAL_TOKENS))]))
    return router.slot_gates(torch.stack(sums).unsqueeze(0))[0]


def _shares(counts: Int64[Tensor, " kinds"]) -> Float[Tensor, " kinds"]:
    return counts.float() / counts.sum().clamp(min=1)


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
