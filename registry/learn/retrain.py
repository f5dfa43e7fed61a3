"""Retraining a domain: new text, a new version, and a gate that it must pass before `latest` moves to it.

extend      the parent's experts and gates are frozen; a new generation of experts is trained beside them
continue    a copy of the parent's experts is trained further
fresh       nothing is taken from the parent
"""

from dataclasses import asdict, dataclass

from ...adapters.bank import ExpertBank, LayerExperts
from ...adapters.config import TrainingConfig
from ...domains.data.corpus import corpus_digest
from ...domains.errors import IntegrityError
from ...domains.progress import OnProgress
from ..base.load import LoadedBase
from ..compose.drift import Drift, measure_drift
from ..measure.evaluate import score_new_domain
from ..measure.held_out import general_examples
from ..pack.pack import DomainPack, read_pack, read_routing
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.store import LATEST, Store
from .acceptance import Gate, measure_gate
from .add_domain import other_domains
from .context import Ground
from .proof import digest_of_tensors
from .retrain_plan import RetrainingPlan
from .run import draft_of, new_lesson, store_version
from .train import learn_more


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """What retraining brought."""

    manifest: PackManifest
    parent: PackManifest
    gate: Gate
    resumed_from: int  # step
    is_repeated: bool = False  # the same command had stored this version before: nothing was trained


def retrain(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    plan: RetrainingPlan,
    *,
    training: TrainingConfig,
    on_progress: OnProgress,
) -> Retrained:
    """Trains the next version of a domain and stores it; `latest` moves to it if the gate holds.

    A command that is repeated after it stored its version trains nothing: the gate's verdict is given again.

    Raises:
        IncompatibleError: The parent belongs to another base model.
        IntegrityError: Something frozen changed; nothing is stored.
    """
    parent, name = plan.parent, plan.parent.name
    check_same_base(wanted=parent.base, found=record, what=f"{name}@{parent.version}")
    lesson = new_lesson(
        store,
        name,
        plan.data,
        record,
        plan.bank,
        training.for_width(base.layout.width),
        origin=(plan.mode, parent.digest, corpus_digest(plan.older)),
    )
    stored = _stored_by(store, name, lesson.run.name)
    if stored:
        return _judged_again(store, stored, plan)
    ground = Ground.of(store, base, record, on_progress)
    older = read_pack(store, parent)
    learned = learn_more(lesson, ground, older, mode=plan.mode)
    inherited = _inherited(plan, older, learned.pack)
    gate = measure_gate(ground, older, learned.pack, name, plan.older, tolerance=plan.tolerance)
    scores = score_new_domain(
        base, ground.preservation, learned.pack, name, plan.data.held_out, general_examples(), on_progress=on_progress
    )
    evaluation = scores.as_json() | {"gate": gate.as_json()}
    draft = draft_of(plan.spec, "domain", record, learned, plan.data, lesson, evaluation, base)
    draft.proof.update(inherited, drift=asdict(_drift(ground, record, name, older, learned.pack)))
    draft.lineage.update(
        parent={"version": parent.version, "digest": parent.digest},
        mode=plan.mode,
        preservation=ground.lineage,
    )
    alias = LATEST if gate.holds else None
    manifest = store_version(store, draft, learned.pack, base, lesson, first_only=False, alias=alias)
    return Retrained(manifest=manifest, parent=parent, gate=gate, resumed_from=learned.figures["resumed_from"])


def _stored_by(store: Store, name: str, run: str) -> PackManifest | None:
    """The version that this very run has stored, if it did and the version is not removed."""
    versions = (store.manifest(name, version) for version in reversed(store.versions(name)))
    return next((manifest for manifest in versions if manifest.train.get("run") == run), None)


def _judged_again(store: Store, stored: PackManifest, plan: RetrainingPlan) -> Retrained:
    """The outcome of a run that was done; its process may have ended before `latest` moved."""
    gate = Gate.from_json(stored.evaluation["gate"], tolerance=plan.tolerance)
    if gate.holds and store.manifest(stored.name).version == plan.parent.version:
        store.set_alias(stored.name, LATEST, stored.version)
    return Retrained(manifest=stored, parent=plan.parent, gate=gate, resumed_from=0, is_repeated=True)


def _inherited(plan: RetrainingPlan, older: DomainPack, new: DomainPack) -> dict[str, object]:
    """Proof that the parent's experts and gates are the same bytes in the new version, where they are to be.

    Raises:
        IntegrityError: They are not.
    """
    if plan.mode != "extend":
        return {}
    before = digest_of_tensors(older.bank.tensors())
    after = digest_of_tensors(_part(new.bank, older.bank).tensors())
    if before != after:
        raise IntegrityError(
            "The parent's experts are not the same in the new version.",
            cause=f"before {before}, after {after}",
            fix="nothing was stored; report this with the traceback of LORARY_DEBUG=1",
        )
    reference = f"{plan.parent.name}@{plan.parent.version}"
    return {"inherited": {"from": reference, "experts": len(older.bank.experts), "digest": before}}


def _part(bank: ExpertBank, older: ExpertBank) -> ExpertBank:
    """Where a bank holds what an older one had."""
    return ExpertBank({index: _layer_part(bank.layers[index], layer) for index, layer in older.layers.items()})


def _layer_part(layer: LayerExperts, older: LayerExperts) -> LayerExperts:
    experts, ranks = slice(len(older.experts)), slice(older.rank)
    return LayerExperts(
        experts=layer.experts[experts],
        A={target: layer.A[target][ranks] for target in older.A},
        B={target: layer.B[target][:, ranks] for target in older.B},
        expert_gate=layer.expert_gate[experts],
        rank_gate=None if older.rank_gate is None else layer.rank_rows()[ranks],
        mean_gate=None if older.mean_gate is None else layer.static_gate()[ranks],
    )


def _drift(ground: Ground, record: BaseRecord, name: str, parent: DomainPack, new: DomainPack) -> Drift:
    """How routing of the other domains changes where the new version takes its parent's place."""
    store = ground.store
    others = {m.name: read_routing(store, m) for m in other_domains(store, record) if m.name != name}
    width = ground.base.layout.width
    return measure_drift(ground.preservation, others, new, width=width, parent=parent)
