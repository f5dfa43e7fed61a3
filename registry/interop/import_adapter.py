"""Importing: a LoRA adapter that PEFT saved becomes the expert bank of a new domain, version 1, exactly.

Nothing is trained. The domain's text gives what an adapter lacks: statistics and prototypes, by which the router knows
the domain; scores and routing drift, as for a domain that was learned here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...adapters.bank import ExpertBank
from ...adapters.config import TrainingConfig
from ...adapters.router.router import Temperatures
from ...domains.data.blocks import encode, pack_blocks
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour, PrototypeIndex
from ..base.load import LoadedBase
from ..compose.drift import Drift, measure_drift
from ..learn.add_domain import other_domains
from ..learn.context import Ground, measure_over
from ..learn.run import tool_record
from ..measure.evaluate import DomainScores, score_new_domain
from ..measure.held_out import general_examples
from ..pack.pack import DomainPack, expert_records, pack_files, read_routing
from ..pack.tensor_file import load_tensors
from ..store.files import make_folder, write_atomic
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
    """Makes an adapter the bank of a new domain, measures it, and stores version 1.

    Raises:
        IncompatibleError: The adapter does not fit the base model, or is more than an expert can be.
        IntegrityError: Its tensors are damaged or do not fit its config.
        ConflictError: Somebody else added a domain of this name meanwhile.
    """
    files, data = what.files, what.data
    tensors = load_tensors(files.tensors, source=f"{files.source}: {ADAPTER_TENSORS}")
    bank = bank_of_adapter(tensors, what.config, base.model, base.layout, source=files.source)
    ground = Ground.of(store, base, record, on_progress)
    preservation = ground.preservation
    others = {m.name: read_routing(store, m) for m in other_domains(store, record)}
    pack = _measured_pack(bank, what, ground)
    index = PrototypeIndex(list(others), [other.prototypes for other in others.values()])
    drift = measure_drift(preservation, others, pack, width=base.layout.width)
    general = general_examples()
    scores = score_new_domain(base, preservation, pack, what.name, data.held_out, general, on_progress=on_progress)
    draft = PackManifest(
        name=what.name,
        role="domain",
        description=what.spec.description,
        license=what.spec.license,
        base=record,
        experts=expert_records(bank),
        allocation={"schedule": "imported", "counts": list(bank.counts(base.layout.count))},
        lineage={"parent": None, "preservation": ground.lineage},
        train={"run": _remember_sources(store, what), "data": data.record, "imported": _import_record(what)},
        evaluation=scores.as_json(),
        proof={"drift": asdict(drift)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=tool_record(),
    )
    written = pack_files(pack, layout=base.layout, base_id=record.id, revision=record.revision)
    manifest = store.commit(draft, written, first_only=True)
    return ImportResult(manifest=manifest, scores=scores, drift=drift, neighbours=index.neighbours(pack.prototypes))


def _measured_pack(bank: ExpertBank, what: ImportPlan, ground: Ground) -> DomainPack:
    """The bank with all that a domain's text says; features are read where KP's are, so that they can be compared."""
    tokenizer = ground.base.tokenizer
    blocks = pack_blocks([encode(example, tokenizer) for example in what.data.train], TrainingConfig().block)
    statistics, prototypes = measure_over(ground, what.name, blocks)
    return DomainPack(
        bank=bank,
        statistics=statistics,
        prototypes=prototypes,
        temperatures=Temperatures(),
        feature_layer=ground.preservation.feature_layer,
    )


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


def _remember_sources(store: Store, what: ImportPlan) -> str:
    """Notes, for this machine only, where the data was read, so that held-out text is found again; the run's name."""
    identity: Mapping[str, Any] = {"data": what.data.record["digest"], **what.files.digests}
    run = store.runs / f"{what.name}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:12]}"
    make_folder(run)
    document = {"name": what.name, "sources": what.data.sources, "state": "done", "version": 1}
    write_atomic(run / "run.json", canonical_json(document))
    return run.name
