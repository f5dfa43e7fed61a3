"""Train the KP bank of a new registry, and add a domain to one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig, TrainingConfig
from ...domains.data.corpus import Source
from ...domains.errors import ConflictError
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour, find_near_duplicate
from ..base.load import LoadedBase
from ..compose.drift import Drift
from ..measure.evaluate import DomainScores, score_new_domain, score_preservation
from ..measure.held_out import check_new_name, general_examples, read_domain_data, spec_of
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import Store
from .chat_probe import ChatProbe, OnProbe, check_probe
from .run import TrainingRun

PRESERVATION_RATE = 0.03  # KP's learning rate as a share of a domain's: it is to keep what the base knows (docs/log.md)

OnNeighbours = Callable[[list[Neighbour]], None]


@dataclass(frozen=True, kw_only=True)
class AddedDomain:
    """Result of adding a domain."""

    manifest: PackManifest
    scores: DomainScores
    drift: Drift
    probe: ChatProbe
    neighbours: list[Neighbour]  # nearest first
    copied_from: str | None  # the domain whose experts the bank was initialized with
    resumed_from: int  # step

    @property
    def near_duplicate(self) -> Neighbour | None:
        """The stored domain whose text is nearly the same, if there is one."""
        return find_near_duplicate(self.neighbours)


def train_preservation(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    *,
    data: Sequence[Source],
    raw: bool = False,
    bank: BankConfig,
    training: TrainingConfig,
    on_progress: OnProgress,
) -> PackManifest:
    """Train the KP bank on general text and store it; it is frozen from then on.

    Raises:
        ConflictError: The registry has a KP bank already.
    """
    spec = spec_of(GENERAL, data)
    if store.versions(GENERAL):
        raise ConflictError(
            f"{store.path} has a KP bank already.", cause="it is trained once", fix="registry init another-folder"
        )
    found = read_domain_data(spec, data, raw=raw)
    if training.learning_rate is None:
        rate = PRESERVATION_RATE * (training.for_width(base.layout.width).learning_rate or 0.0)
        training = replace(training, learning_rate=rate)
    run = TrainingRun(store, base, record, spec, found, bank=bank, training=training, on_progress=on_progress)
    run.prepare()
    run.initialize()
    run.train()
    return run.commit(score_preservation(base, run.pack, found.held_out, on_progress=on_progress))


def add_domain(
    store: Store,
    base: LoadedBase,
    record: BaseRecord,
    name: str,
    *,
    data: Sequence[Source],
    raw: bool = False,
    bank: BankConfig,
    training: TrainingConfig,
    strict: bool,
    on_neighbours: OnNeighbours,
    on_probe: OnProbe,
    on_progress: OnProgress,
) -> AddedDomain:
    """Train new experts for a domain, prove the rest frozen, measure, and store one immutable version.

    Of the other domains only their routing data is read, and the bank of the nearest if its experts are copied.

    Args:
        raw: Whether prompts and completions are read without the base's chat template.
        strict: Refuse a domain that takes everyday chat or older domains' text, before anything is trained.
        on_neighbours: Called before training with the stored domains, nearest first.
        on_probe: Called before training with the routing of chat and of older domains' text.

    Raises:
        InputError: The name or the data cannot be used.
        NotFoundError: No data was given and no built-in domain has this name.
        ConflictError: The domain exists.
        IntegrityError: Something frozen changed; nothing is stored.
        GateFailedError: `strict`, and the domain takes text that is not its own; nothing is trained or stored.
    """
    check_new_name(store, name)
    spec = spec_of(name, data)
    found = read_domain_data(spec, data, raw=raw)
    run = TrainingRun(store, base, record, spec, found, bank=bank, training=training, on_progress=on_progress)
    run.prepare()
    neighbours = run.neighbours()
    on_neighbours(neighbours)
    run.initialize(neighbours)
    probe = run.probe()
    on_probe(probe)
    if strict:
        check_probe(probe)
    run.train()
    drift = run.drift()
    scores = score_new_domain(base, run.kp, run.pack, name, found.held_out, general_examples(), on_progress=on_progress)
    return AddedDomain(
        manifest=run.commit(scores, proof={"drift": asdict(drift), "chat": probe.record()}),
        scores=scores,
        drift=drift,
        probe=probe,
        neighbours=neighbours,
        copied_from=run.copied_from,
        resumed_from=run.resumed_from,
    )
