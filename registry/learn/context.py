"""What a domain is measured and trained over: the frozen base model and the knowledge-preservation bank."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...adapters.composition import GENERAL
from ...domains.data.blocks import Blocks
from ...domains.progress import OnProgress, Progress
from ...domains.statistics.prototypes import make_prototypes
from ...domains.statistics.statistics import DomainStatistics, measure_statistics
from ..base.load import LoadedBase
from ..compose.plan import plan_composition
from ..pack.pack import DomainPack, read_pack
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import Store


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a domain is measured and trained over."""

    base: LoadedBase
    store: Store
    manifest: PackManifest  # of KP's version
    preservation: DomainPack  # KP's
    on_progress: OnProgress

    @classmethod
    def of(cls, store: Store, base: LoadedBase, record: BaseRecord, on_progress: OnProgress) -> "Ground":
        """The base, and the latest KP version of the store."""
        manifest = plan_composition(store, GENERAL, base=record).slots[0].manifest
        preservation = read_pack(store, manifest)
        return cls(base=base, store=store, manifest=manifest, preservation=preservation, on_progress=on_progress)

    @property
    def lineage(self) -> dict[str, Any]:
        """What the lineage of a version says of the KP version that it was trained over."""
        return {"version": self.manifest.version, "digest": self.manifest.digest}


def measure(
    name: str, blocks: Blocks, base: LoadedBase, layer: int, on_progress: OnProgress
) -> tuple[DomainStatistics, Tensor]:
    """Statistics of a text as they are stored, and the mean feature of each block."""
    statistics, means = measure_statistics(
        base.model,
        base.layout,
        blocks,
        layer=layer,
        on_batch=lambda done, total: on_progress(Progress(f"reading {name}", done, total)),
    )
    return statistics.without_rare_tokens(), means


def measure_over(ground: Ground, name: str, blocks: Blocks) -> tuple[DomainStatistics, Tensor]:
    """Statistics of a domain's text where KP's were measured, and prototypes around the mean of general text."""
    statistics, means = measure(name, blocks, ground.base, ground.preservation.feature_layer, ground.on_progress)
    return statistics, make_prototypes(means, ground.preservation.statistics.feature_mean)
