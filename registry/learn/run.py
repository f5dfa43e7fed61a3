"""From a lesson to a stored version: the run that is resumed, the manifest's draft, the commit."""

import hashlib
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ...adapters.config import BankConfig, TrainingConfig
from ...adapters.training.train import discard_checkpoints
from ...domains.data.spec import DomainSpec
from ..base.load import LoadedBase
from ..measure.held_out import DomainData
from ..pack.pack import DomainPack, expert_records, pack_files
from ..store.files import make_folder, write_atomic
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import LATEST, Store
from ..store.strict_json import canonical_json
from .train import Learned, Lesson

TOOL = "lorary"


def new_lesson(
    store: Store,
    name: str,
    found: DomainData,
    record: BaseRecord,
    bank: BankConfig,
    training: TrainingConfig,
    *,
    origin: tuple[str, ...] = (),
) -> Lesson:
    """The same command on the same data means the same run folder: an interrupted run is found again and resumed.

    Args:
        origin: What else the result depends on: how and from which version a domain is retrained.
    """
    identity = [name, found.record["digest"], record.weights, asdict(bank), asdict(training), *origin]
    run = store.runs / f"{name}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}"
    make_folder(run)
    write_atomic(run / "run.json", canonical_json({"name": name, "sources": found.sources, "state": "running"}))
    return Lesson(name=name, train=found.train, bank=bank, training=training, run=run)


def draft_of(
    spec: DomainSpec,
    role: str,
    record: BaseRecord,
    learned: Learned,
    found: DomainData,
    lesson: Lesson,
    evaluation: dict[str, Any],
    base: LoadedBase,
) -> PackManifest:
    """What the manifest will say, but for the files and the version."""
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
        allocation={"schedule": lesson.bank.schedule, "counts": list(learned.pack.bank.counts(base.layout.count))},
        lineage={"parent": None, "preservation": None},
        train=train,
        evaluation=evaluation,
        proof=learned.proof,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=tool_record(),
    )


def tool_record() -> dict[str, str]:
    """The programs that make a version."""
    return {
        "name": TOOL,
        "version": version(TOOL),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def store_version(
    store: Store,
    draft: PackManifest,
    pack: DomainPack,
    base: LoadedBase,
    lesson: Lesson,
    *,
    first_only: bool = True,
    alias: str | None = LATEST,
) -> PackManifest:
    """Stores the version; its run's checkpoints are of no more use afterwards.

    Args:
        first_only: Whether a domain that has a version is left as it is.
        alias: The alias that moves to the new version; None holds it back.

    Raises:
        ConflictError: `first_only`, and somebody else was faster.
    """
    files = pack_files(pack, layout=base.layout, base_id=draft.base.id, revision=draft.base.revision)
    manifest = store.commit(draft, files, first_only=first_only, alias=alias)
    run = json.loads((lesson.run / "run.json").read_text(encoding="utf-8"))
    done = run | {"state": "done", "version": manifest.version}
    write_atomic(lesson.run / "run.json", canonical_json(done))
    discard_checkpoints(lesson.run)
    return manifest
