"""The two use cases that write to a registry: training the KP bank, and adding a domain."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig, TrainingConfig
from ...domains.data.corpus import Source
from ...domains.errors import ConflictError
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour, near_duplicate
from ..base.load import LoadedBase
from ..compose.drift import Drift, measure_drift
from ..measure.evaluate import DomainScores, score_new_domain, score_preservation
from ..measure.held_out import check_new_name, general_examples, read_domain_data, spec_of
from ..pack.pack import read_pack, read_routing
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.store import Store
from .context import Ground
from .run import draft_of, new_lesson, store_version
from .train import OnNeighbours, learn_domain, learn_preservation

PRESERVATION_RATE = 0.03  # KP's learning rate as a share of a domain's: it is to keep what the base knows (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class AddedDomain:
    """What adding a domain brought."""

    manifest: PackManifest
    scores: DomainScores
    drift: Drift
    neighbours: list[Neighbour]  # nearest first
    lender: str | None
    resumed_from: int  # step

    @property
    def near_duplicate(self) -> Neighbour | None:
        """The older domain that is probably the same, if there is one."""
        return near_duplicate(self.neighbours)


def train_preservation(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    *,
    data: Sequence[Source],
    bank: BankConfig | None = None,
    training: TrainingConfig | None = None,
    on_progress: OnProgress,
) -> PackManifest:
    """Trains the KP bank on general text and stores it; it is frozen for good.

    Raises:
        ConflictError: There is one already.
    """
    bank, training = bank or BankConfig(), training or TrainingConfig()
    spec = spec_of(GENERAL, data)
    if store.versions(GENERAL):
        raise ConflictError(
            f"{store.path} has a KP bank already.", cause="it is trained once", fix="registry init another-folder"
        )
    found = read_domain_data(spec, data)
    if training.learning_rate is None:
        rate = PRESERVATION_RATE * (training.for_width(base.layout.width).learning_rate or 0.0)
        training = replace(training, learning_rate=rate)
    lesson = new_lesson(store, GENERAL, found, record, bank, training)
    learned = learn_preservation(lesson, base=base, store=store, on_progress=on_progress)
    scores = score_preservation(base, learned.pack, found.held_out, on_progress=on_progress)
    draft = draft_of(spec, "preservation", record, learned, found, lesson, scores.as_json(), base)
    return store_version(store, draft, learned.pack, base, lesson)


def add_domain(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    name: str,
    *,
    data: Sequence[Source],
    bank: BankConfig,
    training: TrainingConfig,
    on_neighbours: OnNeighbours,
    on_progress: OnProgress,
) -> AddedDomain:
    """Adds a domain: trains only new experts, proves the rest frozen, measures, and stores one immutable version.

    Of the other domains only what they route by is read, and the bank of one that lends its experts.

    Args:
        on_neighbours: Told which stored domains are like this one, nearest first, before training begins.

    Raises:
        InputError: The name or the data is off.
        NotFoundError: No data was given and no built-in domain has this name.
        ConflictError: The domain exists.
        IntegrityError: Something frozen changed; nothing is stored.
    """
    check_new_name(store, name)
    spec = spec_of(name, data)
    found = read_domain_data(spec, data)
    ground = Ground.of(store, base, record, on_progress)
    manifests = {manifest.name: manifest for manifest in other_domains(store, record)}
    others = {other: read_routing(store, manifest) for other, manifest in manifests.items()}
    lesson = new_lesson(store, name, found, record, bank, training.for_width(base.layout.width))
    learned = learn_domain(
        lesson,
        ground,
        others=others,
        lend_bank=lambda lender: read_pack(store, manifests[lender]).bank,
        on_neighbours=on_neighbours,
    )
    drift = measure_drift(ground.preservation, others, learned.pack, width=base.layout.width)
    scores = score_new_domain(
        base, ground.preservation, learned.pack, name, found.held_out, general_examples(), on_progress=on_progress
    )
    draft = draft_of(spec, "domain", record, learned, found, lesson, scores.as_json(), base)
    draft.proof["drift"] = asdict(drift)
    draft.lineage["preservation"] = ground.lineage
    manifest = store_version(store, draft, learned.pack, base, lesson)
    return AddedDomain(
        manifest=manifest,
        scores=scores,
        drift=drift,
        neighbours=learned.neighbours,
        lender=learned.lender,
        resumed_from=learned.figures["resumed_from"],
    )


def other_domains(store: Store, record: BaseRecord) -> list[PackManifest]:
    """The latest version of every domain but KP.

    Raises:
        IncompatibleError: One belongs to another base model.
    """
    manifests = [store.manifest(name) for name in store.domains() if name != GENERAL]
    for manifest in manifests:
        check_same_base(wanted=manifest.base, found=record, what=f"{manifest.name}@{manifest.version}")
    return manifests
