"""DomainStatistics: additive sufficient statistics of a domain's text, from which the router is computed.

The text itself is not stored, only sums:

- token counts, and counts of token bigrams hashed into 65,536 buckets, for the token evidence (naive Bayes); counts of
  one are dropped before storing (docs/threat-model.md describes what remains);
- number, sum and sum of outer products of feature vectors, for the hidden-state evidence (linear discriminant
  analysis). Features are a fixed projection of the input of the first layer with experts: they depend on the frozen
  base model only, so they stay valid.

The statistics of two texts combined are the sum of their statistics, in any order; subtraction removes a text.
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

MIN_COUNT = 2  # lower counts of tokens and pair buckets are dropped
PAIR_BUCKETS = 1 << 16
MAX_FEATURES = 256
MAX_TOKENS = 1 << 22  # limit on the vocabulary size that stored tensors may claim
PROJECTION_SEED = 20260107


@dataclass(frozen=True)
class DomainStatistics:
    """Additive sufficient statistics of a domain's text."""

    token_counts: Int64[Tensor, " vocabulary"]
    pair_counts: Int64[Tensor, " buckets"]
    rows: float  # number of summed feature vectors
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
        """Mean feature vector, float64; zero if there are no rows."""
        return self.feature_sum / max(self.rows, 1.0)

    @property
    def smallest_count(self) -> int:
        """Smallest count of a token or bucket; negative if more was subtracted than added."""
        return int(min(self.token_counts.min().item(), self.pair_counts.min().item()))

    def without_rare_tokens(self) -> "DomainStatistics":
        """Return a copy with counts below `MIN_COUNT` set to zero."""
        tokens, pairs = (torch.where(c < MIN_COUNT, 0, c) for c in (self.token_counts, self.pair_counts))
        return DomainStatistics(tokens, pairs, self.rows, self.feature_sum, self.feature_outer)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store; counts are sparse, as ids and values."""
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
        """Restore statistics from the result of `tensors`.

        Raises:
            KeyError, IndexError, RuntimeError, ValueError: The tensors are inconsistent.
        """
        vocabulary = int(tensors["vocabulary"].item())
        if not 1 <= vocabulary <= MAX_TOKENS:
            raise ValueError(f"vocabulary of {vocabulary} tokens, expected 1 to {MAX_TOKENS}")
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
                "Statistics of different base models cannot be added.",
                cause=f"(vocabulary, features) is {mine} and {theirs}",
            )


def pair_buckets(before: Int64[Tensor, "*tokens"], ids: Int64[Tensor, "*tokens"]) -> Int64[Tensor, "*tokens"]:
    """Return the bucket of each token and its predecessor: a fixed hash, so that counts of packs can be added."""
    return (ids * 31337 + before * 7919) % PAIR_BUCKETS


def feature_projection(width: int) -> Float[Tensor, "features width"] | None:
    """Return the fixed random projection for hidden states of this width, or None up to `MAX_FEATURES`."""
    if width <= MAX_FEATURES:
        return None
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    return torch.randn(MAX_FEATURES, width, generator=generator) / width**0.5


def hidden_features(
    hidden: Float[Tensor, "batch seq width"], projection: Float[Tensor, "features width"] | None
) -> Float[Tensor, "batch seq features"]:
    """Normalise hidden states to unit root mean square and project them, in float32."""
    hidden = hidden.float()
    unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    return unit if projection is None else unit @ projection.T


def causal_means(
    features: Float[Tensor, "batch seq features"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq features"]:
    """Return the mean of the features up to each position, without padding."""
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
    """Compute the statistics of packed text, and the mean feature of each block, for prototypes.

    Feature vectors are causal means at the positions 1, 2, 4, 8, ... of each block, as the router computes them.

    Args:
        layer: Index of the first decoder layer with experts; features are computed from its input.
        on_batch: Called with the number of finished blocks and their total.
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
