"""The two use cases that write to a registry: training the KP bank, and adding a domain."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ..adapters.config import BankConfig
from ..adapters.training import TrainingConfig, discard_checkpoints
from ..domains.catalog import find_domain
from ..domains.corpus import Source
from ..domains.errors import ConflictError
from ..domains.progress import OnProgress
from ..domains.spec import DomainSpec
from .canonical import canonical_json
from .composing import GENERAL, plan_composition
from .domain_data import DomainData, check_new_name, general_examples, read_domain_data, spec_of
from .drift import Drift, measure_drift
from .evaluation import DomainScores, score_new_domain, score_preservation
from .files import make_folder, write_atomic
from .fingerprint import check_same_base
from .learning import Learned, Lesson, learn_domain, learn_preservation
from .loaded_base import LoadedBase
from .manifest import BaseRecord, PackManifest
from .pack import DomainPack, expert_records, pack_files, read_pack
from .store import Store

PRESERVATION_RATE = 0.03  # KP's learning rate as a share of a domain's: it is to keep what the base knows (docs/log.md)
TOOL = "lorary"


@dataclass(frozen=True, kw_only=True)
class AddedDomain:
    """What adding a domain brought."""

    manifest: PackManifest
    scores: DomainScores
    drift: Drift
    neighbours: list[tuple[str, float]]
    lender: str | None
    resumed_from: int  # step


def train_preservation(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    *,
    data: Sequence[Source],
    bank: BankConfig,
    training: TrainingConfig,
    on_progress: OnProgress,
) -> PackManifest:
    """Trains the KP bank on general text and stores it; it is frozen for good.

    Raises:
        ConflictError: There is one already.
    """
    spec = find_domain(GENERAL)
    if store.versions(GENERAL):
        raise ConflictError(
            f"{store.path} has a KP bank already.", cause="it is trained once", fix="registry init another-folder"
        )
    found = read_domain_data(spec, data)
    if training.learning_rate is None:
        rate = PRESERVATION_RATE * (training.for_width(base.anatomy.width).learning_rate or 0.0)
        training = replace(training, learning_rate=rate)
    lesson = _lesson(store, GENERAL, found, record, bank, training)
    learned = learn_preservation(lesson, base=base, store=store, on_progress=on_progress)
    scores = score_preservation(base, learned.pack, found.held_out, on_progress=on_progress)
    draft = _draft(spec, "preservation", record, learned, found, lesson, scores.as_json(), base)
    return _commit(store, draft, learned.pack, base, record, lesson)


def add_domain(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    name: str,
    *,
    data: Sequence[Source],
    bank: BankConfig,
    training: TrainingConfig,
    on_progress: OnProgress,
) -> AddedDomain:
    """Adds a domain: trains only new experts, proves the rest frozen, measures, and stores one immutable version.

    Raises:
        InputError: The name or the data is off.
        NotFoundError: No data was given and no built-in domain has this name.
        ConflictError: The domain exists.
        IntegrityError: Something frozen changed; nothing is stored.
    """
    check_new_name(store, name)
    spec = spec_of(name, data)
    found = read_domain_data(spec, data)
    plan = plan_composition(store, GENERAL, base=record)
    preservation = read_pack(store, plan.slots[0].manifest)
    others = {m.name: read_pack(store, m) for m in _other_domains(store, record)}
    lesson = _lesson(store, name, found, record, bank, training.for_width(base.anatomy.width))
    general = general_examples()
    learned = learn_domain(
        lesson,
        base=base,
        store=store,
        preservation=preservation,
        others=others,
        general=general,
        on_progress=on_progress,
    )
    drift = measure_drift(preservation, others, learned.pack, width=base.anatomy.width)
    scores = score_new_domain(base, preservation, learned.pack, name, found.held_out, general, on_progress=on_progress)
    draft = _draft(spec, "domain", record, learned, found, lesson, scores.as_json(), base)
    draft.proof["drift"] = asdict(drift)
    draft.lineage["preservation"] = {"version": plan.slots[0].manifest.version, "digest": plan.slots[0].manifest.digest}
    manifest = _commit(store, draft, learned.pack, base, record, lesson)
    return AddedDomain(
        manifest=manifest,
        scores=scores,
        drift=drift,
        neighbours=[(n.name, n.similarity) for n in learned.neighbours],
        lender=learned.lender,
        resumed_from=learned.figures["resumed_from"],
    )


def _other_domains(store: Store, record: BaseRecord) -> list[PackManifest]:
    """The latest version of every domain but KP.

    Raises:
        IncompatibleError: One belongs to another base model.
    """
    manifests = [store.manifest(name) for name in store.domains() if name != GENERAL]
    for manifest in manifests:
        check_same_base(wanted=manifest.base, found=record, what=f"{manifest.name}@{manifest.version}")
    return manifests


def _lesson(
    store: Store, name: str, found: DomainData, record: BaseRecord, bank: BankConfig, training: TrainingConfig
) -> Lesson:
    """The same command on the same data means the same run folder: an interrupted run is found again and resumed."""
    identity = [name, found.record["digest"], record.weights, asdict(bank), asdict(training)]
    run = store.runs / f"{name}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}"
    make_folder(run)
    write_atomic(run / "run.json", canonical_json({"name": name, "sources": found.sources, "state": "running"}))
    return Lesson(name=name, train=found.train, held_out=found.held_out, bank=bank, training=training, run=run)


def _draft(
    spec: DomainSpec,
    role: str,
    record: BaseRecord,
    learned: Learned,
    found: DomainData,
    lesson: Lesson,
    evaluation: dict[str, Any],
    base: LoadedBase,
) -> PackManifest:
    bank = asdict(lesson.bank)
    figures = dict(learned.figures)
    train = {
        "run": lesson.run.name,
        "data": found.record,
        "bank": bank | {"targets": None if lesson.bank.targets is None else list(lesson.bank.targets)},
        "settings": asdict(lesson.training),
        "losses": figures["losses"],
        "tokens": figures["tokens"],
        "steps": figures["steps"],
        "warm_start": learned.lender,
        "seconds": figures["seconds"],
    }
    return PackManifest(
        name=lesson.name,
        role=role,
        description=spec.description,
        license=spec.license,
        base=record,
        experts=expert_records(learned.pack.bank),
        allocation={"schedule": lesson.bank.schedule, "counts": list(learned.pack.bank.counts(base.anatomy.count))},
        lineage={"parent": None, "preservation": None},
        train=train,
        evaluation=evaluation,
        proof=learned.proof,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool={
            "name": TOOL,
            "version": version(TOOL),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    )


def _commit(
    store: Store, draft: PackManifest, pack: DomainPack, base: LoadedBase, record: BaseRecord, lesson: Lesson
) -> PackManifest:
    """Stores the version; its run's checkpoints are of no more use afterwards."""
    files = pack_files(pack, anatomy=base.anatomy, base_id=record.id, revision=record.revision)
    manifest = store.commit(draft, files, first_only=True)
    run = json.loads((lesson.run / "run.json").read_text(encoding="utf-8"))
    done = run | {"state": "done", "version": manifest.version}
    write_atomic(lesson.run / "run.json", canonical_json(done))
    discard_checkpoints(lesson.run)
    return manifest
