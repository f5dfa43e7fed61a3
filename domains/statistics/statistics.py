"""DomainStatistics: what the domain router needs to know of a domain's text, as sums that add up.

Three kinds of sums stand for the text, which itself is never stored:

- token counts, and counts of pairs of neighbouring tokens hashed into 65,536 buckets, for the token evidence (naive
  Bayes); what was counted only once is dropped before it is stored (docs/threat-model.md says what that leaves);
- number, sum and sum of outer products of hidden-state features, for the hidden-state evidence (linear discriminant
  analysis). Features are a fixed projection of the hidden state that enters the first expert-bearing layer: a function
  of the frozen base model alone, so they never go stale.

The statistics of two texts together are the sum of their statistics, in any order, and subtracting one removes it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model import ModelLayout, hidden_states_at
from ..data.blocks import Blocks
from ..errors import IncompatibleError

MIN_COUNT = 2  # tokens and buckets of pairs with less are dropped
PAIR_BUCKETS = 1 << 16
MAX_FEATURES = 256
MAX_TOKENS = 1 << 22  # of a vocabulary; what is said of one is not believed beyond
PROJECTION_SEED = 20260107


@dataclass(frozen=True)
class DomainStatistics:
    """Additive sufficient statistics of a domain's text."""

    token_counts: Int64[Tensor, " vocabulary"]
    pair_counts: Int64[Tensor, " buckets"]
    rows: float  # how many feature vectors are summed
    feature_sum: Float[Tensor, " features"]  # float64
    feature_outer: Float[Tensor, "features features"]  # float64

    def __add__(self, other: "DomainStatistics") -> "DomainStatistics":
        self._check_same_shape(other)
        return DomainStatistics(
            self.token_counts + other.token_counts,
            self.pair_counts + other.pair_counts,
            self.rows + other.rows,
            self.feature_sum + other.feature_sum,
            self.feature_outer + other.feature_outer,
        )

    def __sub__(self, other: "DomainStatistics") -> "DomainStatistics":
        self._check_same_shape(other)
        return DomainStatistics(
            self.token_counts - other.token_counts,
            self.pair_counts - other.pair_counts,
            self.rows - other.rows,
            self.feature_sum - other.feature_sum,
            self.feature_outer - other.feature_outer,
        )

    @property
    def feature_mean(self) -> Float[Tensor, " features"]:
        """The mean feature vector, float64; zero where there are no rows."""
        return self.feature_sum / max(self.rows, 1.0)

    @property
    def min_count(self) -> int:
        """The smallest count of a token or a bucket; 0 or more unless something was taken away that was never added."""
        return int(min(self.token_counts.min().item(), self.pair_counts.min().item()))

    def without_rare_tokens(self) -> "DomainStatistics":
        """The same with every count of a token or a bucket under `MIN_COUNT` dropped."""
        tokens, pairs = (torch.where(c < MIN_COUNT, 0, c) for c in (self.token_counts, self.pair_counts))
        return DomainStatistics(tokens, pairs, self.rows, self.feature_sum, self.feature_outer)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors to be stored; counts as ids and counts of what is there."""
        ids = self.token_counts.nonzero().flatten()
        buckets = self.pair_counts.nonzero().flatten()
        return {
            "token_ids": ids.to(torch.int32),
            "token_counts": self.token_counts[ids],
            "pair_ids": buckets.to(torch.int32),
            "pair_counts": self.pair_counts[buckets],
            "vocabulary": torch.tensor([len(self.token_counts)]),
            "rows": torch.tensor([self.rows], dtype=torch.float64),
            "feature_sum": self.feature_sum,
            "feature_outer": self.feature_outer,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "DomainStatistics":
        """The inverse of `tensors`.

        Raises:
            KeyError, IndexError, RuntimeError, ValueError: The tensors do not fit together.
        """
        vocabulary = int(tensors["vocabulary"].item())
        if not 1 <= vocabulary <= MAX_TOKENS:
            raise ValueError(f"a vocabulary of {vocabulary} tokens; 1 to {MAX_TOKENS} are possible")
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        counts[tensors["token_ids"].long()] = tensors["token_counts"].long()
        pairs = torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
        pairs[tensors["pair_ids"].long()] = tensors["pair_counts"].long()
        return cls(counts, pairs, float(tensors["rows"].item()), tensors["feature_sum"], tensors["feature_outer"])

    def _check_same_shape(self, other: "DomainStatistics") -> None:
        mine = (len(self.token_counts), len(self.feature_sum))
        theirs = (len(other.token_counts), len(other.feature_sum))
        if mine != theirs:
            raise IncompatibleError(
                "Statistics of two base models do not add up.",
                cause=f"(vocabulary, features) is {mine} and {theirs}",
            )


def pair_buckets(before: Int64[Tensor, "*tokens"], ids: Int64[Tensor, "*tokens"]) -> Int64[Tensor, "*tokens"]:
    """The bucket of each pair of a token and the one before it: a fixed hash, so that counts of all packs add up."""
    return (ids * 31337 + before * 7919) % PAIR_BUCKETS


def feature_projection(width: int) -> Float[Tensor, "features width"] | None:
    """The fixed projection of hidden states of this width; None where they are small enough to be used whole."""
    if width <= MAX_FEATURES:
        return None
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    return torch.randn(MAX_FEATURES, width, generator=generator) / width**0.5


def hidden_features(
    hidden: Float[Tensor, "batch seq width"], projection: Float[Tensor, "features width"] | None
) -> Float[Tensor, "batch seq features"]:
    """Hidden states at unit root mean square, projected; float32."""
    hidden = hidden.float()
    unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    return unit if projection is None else unit @ projection.T


def causal_means(
    features: Float[Tensor, "batch seq features"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq features"]:
    """At each position the mean of the features so far, padding left out."""
    weight = mask.unsqueeze(-1).to(features.dtype)
    return (features * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)


@torch.inference_mode()
def measure_statistics(
    model: PreTrainedModel,
    layout: ModelLayout,
    blocks: Blocks,
    *,
    layer: int,
    batch: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[DomainStatistics, Float[Tensor, "blocks features"]]:
    """Statistics of packed text, and the mean feature of each block (from which prototypes are made).

    Feature rows are causal means at the positions 1, 2, 4, 8, ... of each block: what the router will see there.

    Args:
        layer: The first expert-bearing decoder layer, whose input is read.
        on_batch: Told how many blocks are done, of how many.
    """
    device = next(model.parameters()).device
    projection = feature_projection(layout.width)
    features = layout.width if projection is None else len(projection)
    vocabulary = model.config.get_text_config().vocab_size
    total = DomainStatistics(
        torch.zeros(vocabulary, dtype=torch.int64),
        torch.zeros(PAIR_BUCKETS, dtype=torch.int64),
        0.0,
        torch.zeros(features, dtype=torch.float64),
        torch.zeros(features, features, dtype=torch.float64),
    )
    means = []
    for start, ids, mask in _batches(blocks, batch):
        hidden = hidden_states_at(model, layout, layer, input_ids=ids.to(device), attention_mask=mask.long().to(device))
        cumulative = causal_means(hidden_features(hidden.cpu(), projection), mask)
        rows = _at_powers_of_two(cumulative, mask).double()
        counts = torch.bincount(ids[mask], minlength=vocabulary)
        has_both = mask[:, 1:] & mask[:, :-1]
        pairs = torch.bincount(pair_buckets(ids[:, :-1], ids[:, 1:])[has_both], minlength=PAIR_BUCKETS)
        total = total + DomainStatistics(counts, pairs, float(len(rows)), rows.sum(0), rows.T @ rows)
        means.append(cumulative[torch.arange(len(ids)), mask.long().sum(1).clamp(min=1) - 1])
        if on_batch:
            on_batch(start + len(ids), len(blocks.input_ids))
    return total, torch.cat(means)


def _batches(blocks: Blocks, batch: int) -> Iterable[tuple[int, Tensor, Tensor]]:
    for start in range(0, len(blocks.input_ids), batch):
        rows = slice(start, start + batch)
        yield start, blocks.input_ids[rows], blocks.attention_mask[rows].bool()


def _at_powers_of_two(
    cumulative: Float[Tensor, "batch seq features"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "rows features"]:
    positions = [2**i - 1 for i in range(cumulative.shape[1].bit_length()) if 2**i <= cumulative.shape[1]]
    return cumulative[:, positions][mask[:, positions]]
