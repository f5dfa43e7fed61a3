"""Prototypes: a few unit vectors that stand for a domain's text, and the FAISS index that finds the nearest.

A prototype is a k-means centroid of block-mean features, taken relative to the mean of general text: raw hidden states
share a large common part, and without it being taken out every domain looks like every other. An index is always
rebuilt from stored vectors; an index file is never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MAX_PROTOTYPES = 16
BLOCKS_PER_PROTOTYPE = 4
NEAR_DUPLICATE = 0.90  # similarity from which two domains are probably one (docs/log.md)
SEED = 1234


@dataclass(frozen=True)
class Neighbour:
    """A stored domain and how like a text it is."""

    name: str
    similarity: float  # mean cosine of the text's prototypes to the domain's nearest ones, in [-1, 1]


def near_duplicate(neighbours: Sequence[Neighbour]) -> Neighbour | None:
    """The nearest domain, if its text is so like that it is probably the same domain."""
    return next((near for near in neighbours if near.similarity >= NEAR_DUPLICATE), None)


def make_prototypes(
    block_means: Float[Tensor, "blocks features"], centre: Float[Tensor, " features"]
) -> Float[Tensor, "prototypes features"]:
    """Spherical k-means centroids of the blocks' features around `centre`, as unit vectors.

    Their number grows with the text, from 1 to `MAX_PROTOTYPES`.
    """
    points = F.normalize(block_means.float() - centre.float(), dim=-1)
    count = max(1, min(MAX_PROTOTYPES, len(points) // BLOCKS_PER_PROTOTYPE))
    return torch.from_numpy(cluster(points.numpy(), count, spherical=True))


def join_prototypes(
    parts: Sequence[Float[Tensor, "_ features"]], shares: Sequence[float]
) -> Float[Tensor, "prototypes features"]:
    """The prototypes of several texts as those of the whole text; `shares` says how much of it each text is.

    Where they are more than `MAX_PROTOTYPES`, they are clustered, each with the weight of the text it stands for.
    """
    vectors = torch.cat([part.float() for part in parts])
    if len(vectors) <= MAX_PROTOTYPES:
        return vectors
    weights = [np.full(len(part), share / len(part)) for part, share in zip(parts, shares, strict=True)]
    found = cluster(vectors.numpy(), MAX_PROTOTYPES, spherical=True, weights=np.concatenate(weights))
    return torch.from_numpy(found)


def cluster(points: np.ndarray, count: int, *, spherical: bool, weights: np.ndarray | None = None) -> np.ndarray:
    """Centroids of k-means, the same for the same points: one thread, fixed seed."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            points.shape[1], count, niter=25, seed=SEED, spherical=spherical, min_points_per_centroid=1
        )
        kmeans.train(np.ascontiguousarray(points, dtype=np.float32), weights)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.array(kmeans.centroids)


class PrototypeIndex:
    """The prototypes of all stored domains in one exact inner-product index."""

    def __init__(self, owners: Sequence[str], prototypes: Sequence[Float[Tensor, "prototypes features"]]):
        self._names = tuple(owners)
        self._owner = np.repeat(np.arange(len(owners)), [len(vectors) for vectors in prototypes])
        self._index: faiss.Index | None = None
        if len(self._owner):
            vectors = torch.cat([F.normalize(v.float(), dim=-1) for v in prototypes]).contiguous().numpy()
            self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(vectors)

    def neighbours(self, prototypes: Float[Tensor, "queries features"]) -> list[Neighbour]:
        """Every stored domain with its similarity to these prototypes, nearest first."""
        if self._index is None:
            return []
        queries = F.normalize(prototypes.float(), dim=-1).contiguous().numpy()
        scores, places = self._index.search(queries, self._index.ntotal)
        best = np.full((len(queries), len(self._names)), -1.0, dtype=np.float32)
        rows = np.repeat(np.arange(len(queries)), places.shape[1])
        np.maximum.at(best, (rows, self._owner[places.ravel()]), scores.ravel())
        found = [Neighbour(name, float(best[:, i].mean())) for i, name in enumerate(self._names)]
        return sorted(found, key=lambda n: (-n.similarity, n.name))
