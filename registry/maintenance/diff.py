"""Compare two stored versions: experts, updates, statistics, scores, files.

Updates of a layer are compared by the Frobenius norm over all target modules under constant gates,
dW = B diag(scale * gate) A. It is computed from products of rank size, without forming dW:

    |B A|^2 = sum over ranks i, j of (B^T B)[i, j] (A A^T)[i, j]        so |dW_b - dW_a|: [B_b, -B_a] and [A_b; A_a]
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.bank import ExpertBank
from ..pack.pack import DomainPack, one_edition, read_pack
from ..store.manifest import PackManifest, check_same_base
from ..store.store import Store

SCORES = ("base", "alone", "routed", "general_base", "general_routed")

Pair = tuple[Tensor, Tensor]  # A (rank, d_in) and B (d_out, rank) with scale and gate folded in


@dataclass(frozen=True, kw_only=True)
class LayerDiff:
    """Decoder layer in both versions."""

    layer: int
    experts: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]  # |dW|
    change: float  # |dW_b - dW_a|


@dataclass(frozen=True, kw_only=True)
class VersionDiff:
    """Differences between two versions, in the given order."""

    versions: tuple[PackManifest, PackManifest]
    layers: tuple[LayerDiff, ...]
    statistics: dict[str, tuple[float, float]]
    feature_cosine: float  # similarity of the mean features of their text
    scores: dict[str, tuple[float | None, float | None]]  # bits per byte
    files: dict[str, str]  # same, changed, added or removed, by path

    def as_json(self) -> dict[str, Any]:
        """Return the value that --json prints."""
        before, after = self.versions
        return {
            "versions": [
                {"name": m.name, "version": m.version, "digest": m.digest, "experts": [asdict(e) for e in m.experts]}
                for m in (before, after)
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "statistics": self.statistics,
            "feature_cosine": self.feature_cosine,
            "scores": self.scores,
            "files": self.files,
        }


def compare_versions(store: Store, before: PackManifest, after: PackManifest) -> VersionDiff:
    """Read two packs and compare them.

    Raises:
        IncompatibleError: They belong to different base models.
        IntegrityError: A file differs from its digest.
    """
    what = f"{after.name}@{after.version}"
    check_same_base(wanted=after.base, found=before.base, what=what)
    packs = read_pack(store, before), read_pack(store, after)
    width = next(iter(packs[0].bank.layers.values())).expert_gate.shape[1]
    means = [part.statistics.feature_mean for part in one_edition(packs, width)]
    return VersionDiff(
        versions=(before, after),
        layers=_diff_layers(packs[0].bank, packs[1].bank),
        statistics=_diff_statistics(*packs),
        feature_cosine=round(F.cosine_similarity(means[0], means[1], dim=0).item(), 6),
        scores=_diff_scores(before, after),
        files=_diff_files(before, after),
    )


def _diff_layers(before: ExpertBank, after: ExpertBank) -> tuple[LayerDiff, ...]:
    found = []
    for index in sorted(before.layers.keys() | after.layers.keys()):
        layers = [bank.layers.get(index) for bank in (before, after)]
        old, new = _folded_pairs(before, index), _folded_pairs(after, index)
        found.append(
            LayerDiff(
                layer=index,
                experts=tuple(len(layer.experts) if layer else 0 for layer in layers),  # type: ignore[arg-type]
                ranks=tuple(layer.rank if layer else 0 for layer in layers),  # type: ignore[arg-type]
                norms=(_update_norm([old]), _update_norm([new])),
                change=_update_norm([new, {target: (A, -B) for target, (A, B) in old.items()}]),
            )
        )
    return tuple(found)


def _folded_pairs(bank: ExpertBank, index: int) -> dict[str, Pair]:
    if index not in bank.layers:
        return {}
    layer = bank.layers[index]
    factor = (layer.scales() * layer.static_gate()).double()
    return {target: (layer.A[target].double(), layer.B[target].double() * factor) for target in layer.A}


def _update_norm(parts: Sequence[dict[str, Pair]]) -> float:
    """Return the norm of the summed updates of the parts, over all target modules."""
    total = 0.0
    for target in dict.fromkeys(target for part in parts for target in part):
        pairs = [part[target] for part in parts if target in part]
        A, B = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], dim=1)
        total += ((B.T @ B) * (A @ A.T)).sum().item()
    return round(max(total, 0.0) ** 0.5, 6)  # rounding may make it negative


def _diff_statistics(before: DomainPack, after: DomainPack) -> dict[str, tuple[float, float]]:
    counts = [
        {
            "tokens": int(pack.statistics.token_counts.sum()),
            "different tokens": int((pack.statistics.token_counts > 0).sum()),
            "feature rows": int(pack.statistics.rows),
            "prototypes": len(pack.prototypes),
        }
        for pack in (before, after)
    ]
    return {name: (counts[0][name], counts[1][name]) for name in counts[0]}


def _diff_scores(before: PackManifest, after: PackManifest) -> dict[str, tuple[float | None, float | None]]:
    """Return scores on each version's held-out set; for a version and its parent also on the parent's."""
    scores = {name: (before.evaluation.get(name), after.evaluation.get(name)) for name in SCORES}
    gate = after.evaluation.get("gate")
    if gate and (after.name, after.parent) == (before.name, before.version):
        scores = {"gate": (gate["parent"], gate["new"])} | scores
    return scores


def _diff_files(before: PackManifest, after: PackManifest) -> dict[str, str]:
    old, new = ({file.path: file.sha256 for file in manifest.files} for manifest in (before, after))
    return {path: _file_state(old.get(path), new.get(path)) for path in sorted(old.keys() | new.keys())}


def _file_state(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return "added" if old is None else "removed"
    return "same" if old == new else "changed"
