"""Collect what a report shows of the packs: a map of their prototypes, and the mean gates of their experts.

    places   prototypes of all domains, projected on their first two principal components
    gates    mean gate of each expert, by decoder layer, on text that it was trained on

Packs are read and verified one at a time, so memory does not grow with their number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..pack.pack import DomainPack, read_pack
from ..pack.pack_source import PackSource
from ..store.manifest import PackManifest

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ReportDetails:
    """Prototype map and expert gates of the packs of a report."""

    places: Mapping[str, Points]  # by domain: (prototypes, 2)
    explained: tuple[float, float]  # share of the variance along each axis
    gates: Mapping[str, tuple[tuple[float, ...], ...]]  # by domain, decoder layer and expert


def read_details(files: PackSource, manifests: Mapping[str, PackManifest]) -> ReportDetails:
    """Return the details of these packs, in their order.

    Raises:
        IntegrityError: A file differs from its digest, or its tensors contradict the manifest.
    """
    prototypes, gates = {}, {}
    for name, manifest in manifests.items():
        pack = read_pack(files, manifest)
        prototypes[name] = pack.prototypes.numpy().astype(np.float64)
        gates[name] = tuple(_mean_gates(pack, depth=len(manifest.allocation["counts"])))
    places, explained = principal_plane(prototypes)
    return ReportDetails(places=places, explained=explained, gates=gates)


def principal_plane(points: Mapping[str, Points]) -> tuple[dict[str, Points], tuple[float, float]]:
    """Project points on their first two principal components.

    The largest entry of each axis is positive, so the same points always give the same picture.

    Args:
        points: By name, (count, width).

    Returns:
        The projected points by name, (count, 2), and the share of the variance that each axis explains.
    """
    whole = np.concatenate(list(points.values()))
    centre = whole.mean(0)
    _, strengths, axes = np.linalg.svd(whole - centre, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(len(axes[:2])), np.abs(axes[:2]).argmax(1)])[:, None]
    axes = np.concatenate([axes, np.zeros((2 - len(axes), whole.shape[1]))])  # a single point has no second axis
    shares = np.append(strengths**2, [0.0, 0.0])[:2] / max(float((strengths**2).sum()), np.finfo(float).tiny)
    return {name: (part - centre) @ axes.T for name, part in points.items()}, (float(shares[0]), float(shares[1]))


def _mean_gates(pack: DomainPack, *, depth: int) -> Iterator[tuple[float, ...]]:
    """Yield the mean gate of each expert of each layer: expert gate times rank gate, averaged over its ranks."""
    for index in range(depth):
        layer = pack.bank.layers.get(index)
        if layer is None:
            yield ()
            continue
        by_expert = layer.static_gate().split([expert.rank for expert in layer.experts])
        yield tuple(part.mean().item() for part in by_expert)
