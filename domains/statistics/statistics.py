"""DomainStatistics: additive sufficient statistics of a domain's text, from which the router is computed.

The text itself is not stored, only sums:

- token counts, and counts of token bigrams hashed into 65,536 buckets, for the token evidence (naive Bayes);
- number, sum and sum of outer products of feature vectors, for the hidden-state evidence (linear discriminant
  analysis). Features are a fixed projection of the input of the first layer with experts: they depend on the frozen
  base model only, so they stay valid;
- second moments of hashed token features, for the ridge evidence (hashed_rows.py).

The statistics of two texts combined are the sum of their statistics, in any order. Counts add up exactly; moments of
features, which are kept in float32, up to its rounding; those of hashed features up to what their factors leave out.

Statistics of the first edition have float64 moments of other features, counts of the tokens of chat templates, and no
hashed features (`first_edition`).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import IncompatibleError
from .hashed_rows import HashedRows, no_hashed_rows
from .hashing import HASHED, MAX_FEATURES, PAIR_BUCKETS

MIN_COUNT = 2  # lower counts of tokens and pair buckets are not published
MAX_TOKENS = 1 << 22  # limit on the vocabulary size that stored tensors may claim
FIRST_FEATURES = 256  # of the first edition
FIRST_PROJECTION_SEED = 20260107


@dataclass(frozen=True)
class DomainStatistics:
    """Additive sufficient statistics of a domain's text."""

    token_counts: Int64[Tensor, " vocabulary"]
    pair_counts: Int64[Tensor, " buckets"]
    rows: float  # number of summed feature vectors
    feature_sum: Float[Tensor, " features"]  # float64
    feature_outer: Float[Tensor, "features features"]  # float64
    hashed: HashedRows | None = None  # None in the first edition

    def __add__(self, other: "DomainStatistics") -> "DomainStatistics":
        self._check_same_shape(other)
        hashed = None if self.hashed is None or other.hashed is None else self.hashed + other.hashed
        outer = self.feature_outer + other.feature_outer
        return DomainStatistics(
            self.token_counts + other.token_counts,
            self.pair_counts + other.pair_counts,
            self.rows + other.rows,
            self.feature_sum + other.feature_sum,
            outer if hashed is None else rounded(outer),
            hashed,
        )

    @property
    def feature_mean(self) -> Float[Tensor, " features"]:
        """Mean feature vector, float64; zero if there are no rows."""
        return self.feature_sum / max(self.rows, 1.0)

    @property
    def smallest_count(self) -> int:
        """Smallest count of a token or bucket."""
        return int(min(self.token_counts.min().item(), self.pair_counts.min().item()))

    def emptied(self) -> "DomainStatistics":
        """Return the statistics of no text, of the same shape and edition."""
        return DomainStatistics(
            torch.zeros_like(self.token_counts),
            torch.zeros_like(self.pair_counts),
            0.0,
            torch.zeros_like(self.feature_sum),
            torch.zeros_like(self.feature_outer),
            None if self.hashed is None else no_hashed_rows(),
        )

    def without_rare_tokens(self) -> "DomainStatistics":
        """Return a copy with counts below `MIN_COUNT` set to zero."""
        tokens, pairs = (torch.where(c < MIN_COUNT, 0, c) for c in (self.token_counts, self.pair_counts))
        return self.with_counts(tokens, pairs)

    def with_counts(
        self, token_counts: Int64[Tensor, " vocabulary"], pair_counts: Int64[Tensor, " buckets"]
    ) -> "DomainStatistics":
        """Return a copy with other counts."""
        return replace(self, token_counts=token_counts, pair_counts=pair_counts)

    def first_edition(self, width: int) -> "DomainStatistics":
        """Return these statistics as those of the first edition, to be routed together with such.

        Raises:
            IncompatibleError: The features of the first edition cannot be computed from these.
        """
        if self.hashed is None:
            return self
        matrix = first_projection(width)
        if matrix is None:
            return replace(self, hashed=None)
        if len(self.feature_sum) != width:
            raise IncompatibleError(
                "Statistics of two editions of the router cannot be combined.",
                cause=f"the base model is {width} wide, and {len(self.feature_sum)} features were kept",
                fix="learn both in a new registry: registry init FOLDER, then registry add-domain",
            )
        matrix = matrix.double()
        return replace(
            self,
            feature_sum=matrix @ self.feature_sum,
            feature_outer=matrix @ self.feature_outer @ matrix.T,
            hashed=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store; counts are sparse, as ids and values, and symmetric moments a triangle."""
        ids = self.token_counts.nonzero().flatten()
        buckets = self.pair_counts.nonzero().flatten()
        found = {
            "token_ids": ids.to(torch.int32),
            "token_counts": self.token_counts[ids],
            "pair_ids": buckets.to(torch.int32),
            "pair_counts": self.pair_counts[buckets],
            "vocabulary": torch.tensor([len(self.token_counts)]),
            "rows": torch.tensor([self.rows], dtype=torch.float64),
            "feature_sum": self.feature_sum,
        }
        if self.hashed is None:
            return found | {"feature_outer": self.feature_outer}
        return found | {
            "feature_triangle": self.feature_outer[_triangle(len(self.feature_sum))].float(),
            "hashed_rows": torch.tensor([self.hashed.rows, self.hashed.cut], dtype=torch.float64),
            "hashed_mean": self.hashed.mean,
            "hashed_factors": self.hashed.factors,
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
        total, rows = tensors["feature_sum"], float(tensors["rows"].item())
        if "feature_triangle" not in tensors:
            return cls(counts, pairs, rows, total, tensors["feature_outer"])
        triangle, mean, factors, sizes = (
            tensors[name] for name in ("feature_triangle", "hashed_mean", "hashed_factors", "hashed_rows")
        )
        features = total.numel()  # compared before a square of this size is made
        if features > MAX_FEATURES or total.shape != (features,) or triangle.shape != (features * (features + 1) // 2,):
            raise ValueError(f"moments of shapes {total.shape} and {triangle.shape}")
        if mean.shape != (HASHED,) or factors.shape[1:] != (HASHED,) or sizes.shape != (2,):
            raise ValueError(f"hashed moments of shapes {mean.shape}, {factors.shape} and {sizes.shape}")
        outer = torch.zeros(features, features, dtype=torch.float64)
        outer[_triangle(features)] = triangle.double()
        outer = outer + outer.triu(1).T
        hashed, cut = sizes.tolist()
        return cls(counts, pairs, rows, total, outer, HashedRows(hashed, mean, factors, cut))

    def _check_same_shape(self, other: "DomainStatistics") -> None:
        mine = (len(self.token_counts), len(self.feature_sum))
        theirs = (len(other.token_counts), len(other.feature_sum))
        if mine != theirs:
            raise IncompatibleError(
                "Statistics of different base models cannot be added.",
                cause=f"(vocabulary, features) is {mine} and {theirs}",
            )


def first_projection(width: int) -> Float[Tensor, "features width"] | None:
    """Return the projection of the first edition, or None up to `FIRST_FEATURES`."""
    if width <= FIRST_FEATURES:
        return None
    generator = torch.Generator().manual_seed(FIRST_PROJECTION_SEED)
    return torch.randn(FIRST_FEATURES, width, generator=generator, dtype=torch.float32) / width**0.5


def rounded(outer: Float[Tensor, "features features"]) -> Float[Tensor, "features features"]:
    """Return moments as they are stored: symmetric, and with the precision of float32."""
    return torch.triu(outer).add(torch.triu(outer, 1).T).float().double()


def _triangle(features: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(features, features)
    return rows, columns
