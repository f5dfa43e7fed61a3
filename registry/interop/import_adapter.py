"""Importing: a LoRA adapter that PEFT saved becomes the expert bank of a new domain, version 1, exactly.

Nothing is trained. The domain's text gives what an adapter lacks: statistics and prototypes, by which the router knows
the domain; scores and routing drift, as for a domain that was learned here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...adapters.config import TrainingConfig
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour
from ..base.load import LoadedBase
from ..compose.drift import Drift
from ..learn.run import TrainingRun
from ..measure.evaluate import DomainScores, score_new_domain
from ..measure.held_out import general_examples
from ..pack.tensor_file import load_tensors
from ..store.manifest import ADAPTER_TENSORS, BaseRecord, PackManifest
from ..store.store import Store
from ..store.strict_json import canonical_json
from .import_plan import ImportPlan
from .peft_tensors import bank_of_adapter


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What importing an adapter brought."""

    manifest: PackManifest
    scores: DomainScores
    drift: Drift
    neighbours: list[Neighbour]  # nearest first


def import_adapter(
    store: Store, base: LoadedBase, record: BaseRecord, what: ImportPlan, *, on_progress: OnProgress
) -> ImportResult:
    """Make an adapter the bank of a new domain, measure it, and store version 1.

    Raises:
        IncompatibleError: The adapter does not fit the base model, or is more than an expert can be.
        IntegrityError: Its tensors are damaged or do not fit its config.
        ConflictError: Another process added a domain of this name meanwhile.
    """
    files, data = what.files, what.data
    tensors = load_tensors(files.tensors, source=f"{files.source}: {ADAPTER_TENSORS}")
    bank = bank_of_adapter(tensors, what.config, base.model, base.layout, source=files.source)
    run = TrainingRun(
        store,
        base,
        record,
        what.spec,
        data,
        bank=None,
        training=TrainingConfig(),
        identity=canonical_json({"data": data.record["digest"], **files.digests}),
        on_progress=on_progress,
    )
    run.prepare()
    run.finish(bank)
    drift = run.drift()
    scores = score_new_domain(
        base, run.kp, run.pack, what.name, data.held_out, general_examples(), on_progress=on_progress
    )
    manifest = run.commit(
        scores, train={"imported": _import_record(what)}, schedule="imported", proof={"drift": asdict(drift)}
    )
    return ImportResult(manifest=manifest, scores=scores, drift=drift, neighbours=run.neighbours())


def _import_record(what: ImportPlan) -> dict[str, Any]:
    """Where the adapter came from, for the manifest; of a folder only its name, the rest is nobody else's business."""
    files, config = what.files, what.config
    return {
        "from": Path(files.source).name if files.is_local else files.source,
        "commit": files.commit,
        "files": files.digests,
        "rank": config.rank,
        "alpha": config.alpha,
        "peft_version": config.peft_version,
    }
