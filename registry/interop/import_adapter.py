"""Import a PEFT LoRA adapter as version 1 of a new domain, numerically exact and without training.

Statistics and prototypes for the router, scores and routing drift are computed from the domain's text, as for a domain
that is trained here. An adapter without text has none of these: compositions give it a constant weight.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...adapters.bank import ExpertBank
from ...adapters.config import TrainingConfig
from ...domains.data.corpus import corpus_digest
from ...domains.errors import IncompatibleError
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour
from ..base.load import LoadedBase
from ..compose.drift import Drift
from ..learn.add_domain import OnNeighbours
from ..learn.chat_probe import ChatProbe, OnProbe, check_probe
from ..learn.run import TrainingRun
from ..measure.evaluate import DomainScores, score_new_domain
from ..measure.held_out import DomainData, general_examples
from ..pack.tensor_file import ADAPTER_TYPES, load_tensors
from ..store.manifest import ADAPTER_TENSORS, NO_ROUTING, BaseRecord, PackManifest
from ..store.store import Store
from ..store.strict_json import canonical_json
from .import_plan import ImportPlan
from .peft_tensors import convert_adapter

NO_TEXT = DomainData(
    train=[],
    held_out=[],
    record={"files": [], "digest": corpus_digest([]), "rows": 0, "bytes": 0, "held_out": 0, "held_out_share": 0.0},
    sources=[],
)


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """Result of an import."""

    manifest: PackManifest
    scores: DomainScores | None  # None without text
    drift: Drift | None
    probe: ChatProbe | None
    neighbours: list[Neighbour]  # nearest first


def import_adapter(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    plan: ImportPlan,
    *,
    strict: bool,
    on_neighbours: OnNeighbours,
    on_probe: OnProbe,
    on_progress: OnProgress,
) -> ImportResult:
    """Convert an adapter into the bank of a new domain, evaluate it, and store version 1.

    Args:
        strict: Refuse a domain that takes everyday chat or older domains' text.
        on_neighbours: Called with the stored domains, nearest first, where there is text.
        on_probe: Called with the routing of chat and of older domains' text, where there is text.

    Raises:
        IncompatibleError: The adapter does not fit the base model, is not plain LoRA on linear modules, or has numbers
            that float32 does not hold.
        IntegrityError: Its tensors are damaged or do not match its config.
        ConflictError: Another process added a domain of this name in the meantime.
        GateFailedError: `strict`, and the domain takes text that is not its own; nothing is stored.
    """
    files, data = plan.files, plan.data
    tensors = load_tensors(files.tensors, source=f"{files.source}: {ADAPTER_TENSORS}", types=ADAPTER_TYPES)
    bank = convert_adapter(tensors, plan.config, base.model, base.layout, source=files.source)
    _check_targets(bank, base, files.source)
    run = TrainingRun(
        store,
        base,
        record,
        plan.spec,
        NO_TEXT if data is None else data,
        bank=None,
        training=TrainingConfig(),
        identity=canonical_json({"data": (data or NO_TEXT).record["digest"], **files.digests}),
        on_progress=on_progress,
    )
    if data is None:
        run.prepare_without_text()
        run.finish(bank)
        train = {"imported": {**_import_record(plan), "routing": NO_ROUTING}}
        manifest = run.commit(None, train=train, schedule="imported")
        return ImportResult(manifest=manifest, scores=None, drift=None, probe=None, neighbours=[])
    run.prepare()
    neighbours = run.neighbours()
    on_neighbours(neighbours)
    run.finish(bank)
    probe = run.probe_of(run.pack, parent=None)
    on_probe(probe)
    if strict:
        check_probe(probe)
    drift = run.drift()
    scores = score_new_domain(
        base, run.kp, run.pack, plan.name, data.held_out, general_examples(), on_progress=on_progress
    )
    manifest = run.commit(
        scores,
        train={"imported": _import_record(plan)},
        schedule="imported",
        proof={"drift": asdict(drift), "chat": probe.record()},
    )
    return ImportResult(manifest=manifest, scores=scores, drift=drift, probe=probe, neighbours=neighbours)


def _check_targets(bank: ExpertBank, base: LoadedBase, source: str) -> None:
    """Raise if the adapter extends a module that experts cannot extend."""
    for index, layer in bank.layers.items():
        for target in layer.A:
            if target not in base.targets.by_layer[index]:
                reason = base.targets.excluded.get(target, "experts cannot extend it")
                cause = f"it targets {target} of layer {index}: {reason}"
                raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause)


def _import_record(plan: ImportPlan) -> dict[str, Any]:
    """Return the adapter's origin for the manifest; of a local folder only its name, as paths are private."""
    files, config = plan.files, plan.config
    return {
        "from": Path(files.source).name if files.is_local else files.source,
        "commit": files.commit,
        "files": files.digests,
        "rank": config.rank,
        "alpha": config.alpha,
        "peft_version": config.peft_version,
    }
