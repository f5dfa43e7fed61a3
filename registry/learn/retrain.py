"""Retrain a domain: new text, a new version, and an acceptance check before `latest` moves to it.

extend      the parent's experts and gates are frozen; a new generation of experts is trained beside them
continue    a copy of the parent's experts is trained further
fresh       nothing is taken from the parent
"""

import copy
from dataclasses import asdict, dataclass, replace

from ...adapters.bank import ExpertBank, LayerExperts
from ...adapters.config import TrainingConfig
from ...domains.data.corpus import corpus_digest, limit_bytes
from ...domains.errors import IntegrityError
from ...domains.progress import OnProgress
from ...domains.statistics.statistics import DomainStatistics
from ..base.load import LoadedBase
from ..measure.evaluate import score_new_domain
from ..measure.held_out import MAX_SCORED_BYTES, general_examples
from ..pack.pack import DomainPack, read_pack
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.store import LATEST, Store
from .acceptance import AcceptanceCheck, check_acceptance
from .chat_probe import ChatProbe, OnProbe, check_probe
from .proof import digest_of_tensors
from .rare_tokens import with_rare_tokens
from .retrain_plan import RetrainingPlan
from .run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class RetrainedDomain:
    """Result of retraining."""

    manifest: PackManifest
    parent: PackManifest
    acceptance: AcceptanceCheck
    probe: ChatProbe
    resumed_from: int  # step
    is_repeated: bool = False  # the same command stored this version before: nothing was trained


def retrain(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    plan: RetrainingPlan,
    *,
    training: TrainingConfig,
    strict: bool,
    on_probe: OnProbe,
    on_progress: OnProgress,
) -> RetrainedDomain:
    """Train the next version of a domain and store it; `latest` moves to it if the acceptance check holds.

    A command that is repeated after it stored its version trains nothing and returns the same verdict.

    Args:
        strict: Refuse a version that takes everyday chat or older domains' text, before anything is trained.
        on_probe: Called before training with the routing of chat and of older domains' text.

    Raises:
        IncompatibleError: The parent belongs to another base model.
        IntegrityError: Something frozen changed; nothing is stored.
        GateFailedError: `strict`, and the version takes text that is not its own; nothing is trained or stored.
    """
    parent, name = plan.parent, plan.parent.name
    check_same_base(wanted=parent.base, found=record, what=f"{name}@{parent.version}")
    run = TrainingRun(
        store,
        base,
        record,
        plan.spec,
        plan.data,
        bank=plan.bank,
        training=training,
        origin=(plan.mode, parent.digest, corpus_digest(plan.older)),
        on_progress=on_progress,
    )
    stored = run.stored_version()
    older = read_pack(store, parent)
    if stored:
        return _repeated(run, older, stored, plan, strict=strict)
    run.prepare(new_experts=plan.mode != "continue")
    _start(run, older, plan.mode, with_rare_tokens(store, parent, older.statistics))
    probe = run.probe(parent=older)
    on_probe(probe)
    if strict:
        check_probe(probe)
    run.train()
    inherited = _inherited(plan, older, run.pack)
    acceptance = check_acceptance(run, older, plan.older, tolerance=plan.tolerance)
    scores = score_new_domain(
        base, run.kp, run.pack, name, plan.data.held_out, general_examples(), on_progress=on_progress
    )
    manifest = run.commit(
        scores,
        evaluation={"gate": acceptance.as_json()},
        lineage={"parent": {"version": parent.version, "digest": parent.digest}, "mode": plan.mode},
        proof={**inherited, "drift": asdict(run.drift(parent=older)), "chat": probe.record()},
        first_only=False,
        alias=LATEST if acceptance.holds else None,
    )
    return RetrainedDomain(
        manifest=manifest, parent=parent, acceptance=acceptance, probe=probe, resumed_from=run.resumed_from
    )


def _start(run: TrainingRun, parent: DomainPack, mode: str, statistics: DomainStatistics) -> None:
    """Set the bank to be trained, and what is kept of the parent's text, which has these statistics."""
    if mode != "fresh":
        run.keep_text(replace(parent.routing(), statistics=statistics))
    if mode == "continue":
        run.bank = copy.deepcopy(parent.bank)
    else:
        run.initialize(beside=parent.bank if mode == "extend" else None)


def _repeated(
    run: TrainingRun, older: DomainPack, stored: PackManifest, plan: RetrainingPlan, *, strict: bool
) -> RetrainedDomain:
    """Return the outcome of a run that was done; its process may have ended before `latest` moved."""
    store = run.store
    probe = run.probe_of(read_pack(store, stored), parent=older)
    if strict:
        check_probe(probe)
    acceptance = AcceptanceCheck.from_json(stored.evaluation["gate"], tolerance=plan.tolerance)
    acceptance = acceptance.described(limit_bytes(plan.older, MAX_SCORED_BYTES))
    if acceptance.holds and store.manifest(stored.name).version == plan.parent.version:
        store.set_alias(stored.name, LATEST, stored.version)
    return RetrainedDomain(
        manifest=stored, parent=plan.parent, acceptance=acceptance, probe=probe, resumed_from=0, is_repeated=True
    )


def _inherited(plan: RetrainingPlan, older: DomainPack, new: DomainPack) -> dict[str, object]:
    """Prove that the parent's experts and gates are the same bytes in the new version, where they must be.

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
    """Return the part of a bank that holds what an older one had."""
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
