"""Fixed pseudo-random numbers from integers: the projection of wide hidden states, and hashed token features.

All numbers are bits of SplitMix64 (Steele, Lea and Flood 2014), whose value at a position does not depend on others. No
random generator of a library takes part, whose numbers change between releases or with the default dtype.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

PAIR_BUCKETS = 1 << 16
HASHED = 4096  # hashed features of tokens and pairs, for the ridge evidence
MAX_FEATURES = 1024
_PROJECTION, _TOKENS, _PAIRS = 1 << 40, 2 << 40, 3 << 40  # where in the sequence the numbers of each use begin


def random_words(start: int, count: int) -> np.ndarray:
    """Return `count` words of SplitMix64 from position `start`, as uint64."""
    state = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@cache
def feature_projection(width: int) -> Float[Tensor, "features width"] | None:
    """Return the projection of hidden states of this width to `MAX_FEATURES`, or None up to that width.

    Its entries are +-1 / sqrt(width) (Achlioptas 2003), the signs being bits in the order of rows.
    """
    if width <= MAX_FEATURES:
        return None
    count = MAX_FEATURES * width
    words = random_words(_PROJECTION, -(-count // 64))
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    signs = 1 - 2 * bits.reshape(-1)[:count].astype(np.int8)
    return torch.from_numpy(signs).view(MAX_FEATURES, width).float() / width**0.5


def pair_buckets(before: Int64[Tensor, "*tokens"], ids: Int64[Tensor, "*tokens"]) -> Int64[Tensor, "*tokens"]:
    """Return the bucket of each token and its predecessor: a fixed hash, so that counts of packs can be added."""
    return (ids * 31337 + before * 7919) % PAIR_BUCKETS


@cache
def signed_places(vocabulary: int) -> Int[Tensor, "kinds"]:
    """Return the hashed feature of each kind: the tokens of the vocabulary, then the buckets of pairs.

    A value below `HASHED` is a feature with sign +1, one from there on the feature `HASHED` lower with sign -1.
    """
    words = np.concatenate([random_words(_TOKENS, vocabulary), random_words(_PAIRS, PAIR_BUCKETS)])
    return torch.from_numpy((words % np.uint64(2 * HASHED)).astype(np.int16))
