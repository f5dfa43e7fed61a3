"""Prototypes: unit vectors that represent a domain's text, and a FAISS index for nearest domains.

A prototype is a k-means centroid of block-mean features, relative to the mean of general text: raw hidden states share
a large common component, so that without centring all domains look alike. The index is always rebuilt from stored
vectors; no index file is read.
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
NEAR_DUPLICATE = 0.90  # minimum similarity of two domains that are probably the same (docs/log.md)
SEED = 1234


@dataclass(frozen=True)
class Neighbour:
    """Stored domain and its similarity to a text."""

    name: str
    similarity: float  # mean cosine of the text's prototypes to the domain's nearest ones, in [-1, 1]


def find_near_duplicate(neighbours: Sequence[Neighbour]) -> Neighbour | None:
    """Return the first neighbour with a similarity of at least `NEAR_DUPLICATE`, if there is one."""
    return next((near for near in neighbours if near.similarity >= NEAR_DUPLICATE), None)


def make_prototypes(
    block_means: Float[Tensor, "blocks features"], centre: Float[Tensor, " features"]
) -> Float[Tensor, "prototypes features"]:
    """Return the spherical k-means centroids of block features relative to `centre`, as unit vectors.

    Their number grows with the number of blocks, from 1 to `MAX_PROTOTYPES`.
    """
    points = F.normalize(block_means.float() - centre.float(), dim=-1)
    count = max(1, min(MAX_PROTOTYPES, len(points) // BLOCKS_PER_PROTOTYPE))
    return torch.from_numpy(cluster(points.numpy(), count, spherical=True))


def join_prototypes(
    parts: Sequence[Float[Tensor, "_ features"]], shares: Sequence[float]
) -> Float[Tensor, "prototypes features"]:
    """Merge the prototypes of several texts; `shares` are the shares of the texts in the whole.

    If there are more than `MAX_PROTOTYPES`, they are clustered, weighted by the amount of text they represent.
    """
    vectors = torch.cat([part.float() for part in parts])
    if len(vectors) <= MAX_PROTOTYPES:
        return vectors
    weights = [np.full(len(part), share / len(part)) for part, share in zip(parts, shares, strict=True)]
    found = cluster(vectors.numpy(), MAX_PROTOTYPES, spherical=True, weights=np.concatenate(weights))
    return torch.from_numpy(found)


def cluster(points: np.ndarray, count: int, *, spherical: bool, weights: np.ndarray | None = None) -> np.ndarray:
    """Return k-means centroids, deterministic by one thread and a fixed seed."""
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
    """Exact inner-product index over the prototypes of all stored domains."""

    def __init__(self, owners: Sequence[str], prototypes: Sequence[Float[Tensor, "prototypes features"]]):
        self._names = tuple(owners)
        self._owner = np.repeat(np.arange(len(owners)), [len(vectors) for vectors in prototypes])
        self._index: faiss.Index | None = None
        if len(self._owner):
            vectors = torch.cat([F.normalize(v.float(), dim=-1) for v in prototypes]).contiguous().numpy()
            self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(vectors)

    def neighbours(self, prototypes: Float[Tensor, "queries features"]) -> list[Neighbour]:
        """Return all stored domains with their similarity to these prototypes, nearest first."""
        if self._index is None:
            return []
        queries = F.normalize(prototypes.float(), dim=-1).contiguous().numpy()
        scores, places = self._index.search(queries, self._index.ntotal)
        best = np.full((len(queries), len(self._names)), -1.0, dtype=np.float32)
        rows = np.repeat(np.arange(len(queries)), places.shape[1])
        np.maximum.at(best, (rows, self._owner[places.ravel()]), scores.ravel())
        found = [Neighbour(name, float(best[:, i].mean())) for i, name in enumerate(self._names)]
        return sorted(found, key=lambda n: (-n.similarity, n.name))
