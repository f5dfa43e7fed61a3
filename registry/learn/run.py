"""TrainingRun: one bank from its data to a stored version.

    run = TrainingRun(store, base, record, spec, data, bank=bank, training=training, on_progress=on_progress)
    run.prepare()             # checks, token blocks, statistics, prototypes
    run.initialize()          # the bank before training; the use case may copy or replace it
    run.train()               # between two sets of digests
    run.commit(evaluation)    # one immutable version

`init`, `add-domain`, `retrain` and `import` differ only in what they do between these steps. A bank is trained on the
base model and the knowledge-preservation (KP) bank alone, under the gates that the router of {KP, domain} computes, and
never on top of other domains' experts, so every subset of domains is composed of what was trained. The KP bank itself
is trained alone, with slot gate 1.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...adapters.allocation import bearing_layers
from ...adapters.bank import ExpertBank, extend_bank, new_bank
from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig, TrainingConfig
from ...adapters.layer.attach import attach
from ...adapters.layer.stack import Stack
from ...adapters.router.router import FIRST_EDITION, Temperatures
from ...adapters.training.train import discard_checkpoints
from ...adapters.training.warm_start import (
    MIN_SIMILARITY,
    activation_weights,
    can_copy_experts,
    copy_experts,
    seed_expert_gates,
)
from ...domains.data.blocks import Blocks, encode, pack_blocks
from ...domains.data.catalog import everyday_requests
from ...domains.data.documents import split_documents
from ...domains.data.example import Example
from ...domains.data.row_list import RowList
from ...domains.data.spec import DomainSpec
from ...domains.errors import InputError
from ...domains.progress import OnProgress, Progress
from ...domains.statistics.measure import block_means, measure_statistics
from ...domains.statistics.prototypes import Neighbour, PrototypeIndex, join_prototypes, make_prototypes
from ...domains.statistics.statistics import DomainStatistics
from ..base.load import LoadedBase
from ..compose.build import base_router
from ..compose.drift import Drift, measure_drift
from ..compose.plan import KP_PRIOR, plan_composition
from ..measure.evaluate import DomainScores
from ..measure.held_out import DomainData, held_out_at_hand
from ..pack.pack import (
    DomainPack,
    RoutingData,
    expert_records,
    one_edition,
    pack_files,
    read_pack,
    read_routing,
)
from ..store.blobs import sha256_of
from ..store.files import make_folder
from ..store.manifest import BaseRecord, PackManifest, check_same_base
from ..store.seals import write_sealed
from ..store.store import LATEST, Store
from ..store.strict_json import canonical_json
from .chat_probe import ChatProbe, probe_chat
from .rare_tokens import keep_rare_tokens
from .train import train_frozen

TOOL = "lorary"
NEAREST = 4  # older domains whose held-out text is routed before and after; others are probed by their statistics
MAX_READ_BYTES = 20_000_000  # of an older domain's data: reading more takes longer than the probe
ORDER_FILE = "order.json"  # digest of the training rows in order, while the run is unfinished


class TrainingRun:
    """A bank on its way from data to a stored version.

    The run owns what its steps share: the folder with checkpoints, the settings, the base model and the KP bank under
    the new experts, and the result. The same command on the same data gets the same folder, so an interrupted run is
    found and resumed.

    Attributes:
        folder: The run's folder: a record of the data's location and the checkpoints.
        preservation: The KP pack; None while the KP bank itself is trained.
        blocks: Token blocks of the training text.
        statistics: Statistics of the text that the version stands for.
        prototypes: Prototypes of that text.
        bank: The bank to be trained.
        frozen: Older generations of the domain's experts, which stay as they are.
        copied_from: The domain whose experts the bank was initialized with.
        pack: The result.
        proof: The frozen proof of the training.
        figures: Steps, tokens, losses and seconds of the training.
    """

    def __init__(
        self,
        store: Store,
        base: LoadedBase,
        record: BaseRecord,
        spec: DomainSpec,
        data: DomainData,
        *,
        bank: BankConfig | None,
        training: TrainingConfig,
        on_progress: OnProgress,
        origin: tuple[str, ...] = (),
        identity: bytes | None = None,
    ):
        """Choose the folder; nothing is written before `prepare`.

        Args:
            bank: Settings of the new experts; None if the bank is not trained here.
            origin: What else the result depends on: how and from which version a domain is retrained.
            identity: Bytes that identify the run, if it is not settings and data that do.
        """
        self.store, self.base, self.record = store, base, record
        self.spec, self.name, self.data = spec, spec.name, data
        self.bank_config = bank
        self.training = training.for_width(base.layout.width)
        self.on_progress = on_progress
        self.frozen: ExpertBank | None = None
        self.copied_from: str | None = None
        self._lender: str | None = None  # its digest: a pack names no other domain
        self.proof: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.blocks: Blocks
        self.validation: Blocks | None = None
        self.statistics: DomainStatistics
        self.prototypes: Tensor
        self.bank: ExpertBank
        self.pack: DomainPack
        self.folder = store.runs / f"{self.name}-{hashlib.sha256(identity or self._identity(origin)).hexdigest()[:12]}"
        self.preservation: DomainPack | None = None
        self._preservation_manifest: PackManifest | None = None
        if self.name != GENERAL:
            self._preservation_manifest = plan_composition(store, GENERAL, base=record).slots[0].manifest
            self.preservation = read_pack(store, self._preservation_manifest)
        self.temperatures = self._usual_temperatures()

    def _identity(self, origin: tuple[str, ...]) -> bytes:
        assert self.bank_config is not None
        settings = [asdict(self.bank_config), asdict(self.training)]
        parts = [self.name, self.data.record["digest"], self.record.weights, *settings, *origin]
        parts.append(self.data.record.get("held_out_digest", ""))  # equal rows can name other documents
        if self.is_chat and any(example.prompt for example in (*self.data.train, *self.data.held_out)):
            parts.append("chat")
        if self._dtype != "float32":  # a checkpoint of another dtype is not resumed
            parts.append(self._dtype)
        return json.dumps(parts, sort_keys=True).encode()

    @property
    def is_chat(self) -> bool:
        """Whether a prompt and its completion are turns of the base's chat template."""
        return not self.data.raw and self.record.chat_template is not None

    @property
    def _dtype(self) -> str:
        """The dtype in which the base model computes."""
        return str(self.base.model.dtype).removeprefix("torch.")

    @property
    def kp(self) -> DomainPack:
        """The KP pack under a domain's experts."""
        assert self.preservation is not None, "the KP bank has none under it"
        return self.preservation

    @property
    def width(self) -> int:
        """Width of the base model's hidden state."""
        return self.base.layout.width

    @property
    def feature_layer(self) -> int:
        """The decoder layer whose input the router reads: the first that carries KP's experts."""
        if self.preservation is not None:
            return self.preservation.feature_layer
        assert self.bank_config is not None
        return self._bearing_layers(self.bank_config)[0]

    def _bearing_layers(self, bank: BankConfig) -> tuple[int, ...]:
        """Return the layers that get experts: of those after the expert-free ones, all that have a target."""
        targets = self.base.targets.choose(bank.targets)
        without = [layer for layer, paths in enumerate(targets) if not paths]
        return bearing_layers(self.base.layout.count, bank.expert_free, without)

    # --- the other domains of the store ---

    @cached_property
    def others(self) -> dict[str, PackManifest]:
        """The latest version of every other domain but KP, by name.

        Raises:
            IncompatibleError: One belongs to another base model.
        """
        names = [name for name in self.store.domains() if name not in (GENERAL, self.name)]
        manifests = {name: self.store.manifest(name) for name in names}
        for manifest in manifests.values():
            check_same_base(wanted=manifest.base, found=self.record, what=f"{manifest.name}@{manifest.version}")
        return manifests

    @cached_property
    def routing_of_others(self) -> dict[str, RoutingData]:
        """What the other domains route by, where they do; their experts are not read."""
        return {name: read_routing(self.store, one) for name, one in self.others.items() if one.is_routed}

    def neighbours(self) -> list[Neighbour]:
        """Return the other domains by similarity of their prototypes, nearest first."""
        return self._neighbours_of(self._routing_data())

    def _neighbours_of(self, one: RoutingData) -> list[Neighbour]:
        names = list(self.routing_of_others)
        *others, mine = one_edition([*self.routing_of_others.values(), one], self.width)
        return PrototypeIndex(names, [other.prototypes for other in others]).neighbours(mine.prototypes)

    def drift(self, *, parent: DomainPack | None = None) -> Drift:
        """Measure how the routing of the other domains' text changes.

        Args:
            parent: The version that the new one replaces.
        """
        return measure_drift(
            self.kp, self.routing_of_others, self.pack, width=self.width, parent=parent, roles=self.base.roles
        )

    def probe(self, *, parent: DomainPack | None = None) -> ChatProbe:
        """Measure what the router will give to the domain: of everyday chat, and of older domains' text.

        Args:
            parent: The version that the new one replaces.
        """
        bank = extend_bank(self.frozen, self.bank) if self.frozen else self.bank
        return self.probe_of(self._packed(bank), parent=parent)

    def probe_of(self, new: DomainPack, *, parent: DomainPack | None) -> ChatProbe:
        """Measure the same for a pack of this domain."""
        self.on_progress(Progress(f"probing the routing of {self.name}", 0, 0))
        nearest = [near.name for near in self._neighbours_of(new.routing())[:NEAREST]]
        found = {name: held_out_at_hand(self.store, self.others[name], max_bytes=MAX_READ_BYTES) for name in nearest}
        return probe_chat(
            self.name,
            self.base,
            self.kp,
            self.routing_of_others,
            new,
            parent=parent,
            held_out={name: rows for name, rows in found.items() if rows},
        )

    # --- prepare ---

    def prepare(self, *, new_experts: bool = True) -> None:
        """Check the settings against the base model, then measure the text.

        Args:
            new_experts: Whether experts are added in the layers that the settings name.

        Raises:
            InputError: The base model has no room for such experts or blocks, or they would precede the layer whose
                input the router reads.
            CorpusError: The chat template cannot place a turn of a row, or ignores a field of it.
        """
        if self.preservation is not None:
            _ = self.others  # refuses domains of another base model before anything is measured
        make_folder(self.folder)
        self._discard_other_order()
        self._write_record({"state": "running"})
        if self.bank_config is not None:
            self._check_settings(self.bank_config)
            if new_experts and self.preservation is not None:
                self._check_first_layer(self.bank_config, self.preservation)
        tokenizer = self.base.tokenizer
        for example in self.data.held_out:  # a row that cannot be measured is refused before training, not after
            encode(example, tokenizer)
        encoded = [encode(example, tokenizer) for example in self._without_validation(tokenizer)]
        self.blocks = pack_blocks(encoded, self.training.block)
        if self.validation is not None:  # routing learns from all rows
            encoded = [encode(example, tokenizer) for example in self.data.train]
        if self.preservation is None:  # everyday questions are general text, too, and few texts hold any
            encoded += [encode(example, tokenizer) for example in everyday_requests()]
        self.statistics = measure_statistics(
            self.base.model,
            self.base.layout,
            encoded,
            layer=self.feature_layer,
            roles=self.base.roles if self.temperatures.is_weighted else replace(self.base.roles, weights=None),
            first_edition=self.temperatures.is_first_edition,
            on_batch=lambda done, total: self.on_progress(Progress(f"reading {self.name}", done, total)),
        )
        general = self.statistics if self.preservation is None else self.preservation.statistics
        means = block_means(
            self.base.model,
            self.base.layout,
            self.blocks,
            layer=self.feature_layer,
            first_edition=self.temperatures.is_first_edition,
        )
        self.prototypes = make_prototypes(means, general.feature_mean)

    def _without_validation(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Return the rows to train on, and set aside those that the training is measured by."""
        if not self.training.validation:
            return self.data.train
        found = split_documents(self.data.train, self.training.validation)
        if not found.train or not found.held_out:
            raise InputError(
                f"The data of {self.name!r} has too few documents to set some aside for validation.",
                cause=f"{len(self.data.train)} rows are trained on, of {found.documents} documents",
                fix="give more text, or leave out --validation",
            )
        self.validation = pack_blocks([encode(one, tokenizer) for one in found.held_out], self.training.block)
        return found.train

    def prepare_without_text(self) -> None:
        """Prepare a bank that comes without text, and so without routing data."""
        _ = self.others
        make_folder(self.folder)
        self._write_record({"state": "running"})
        self.statistics = self.kp.statistics.emptied()
        self.prototypes = self.kp.prototypes[:0].clone()

    def initialize(self, neighbours: Sequence[Neighbour] = (), *, beside: ExpertBank | None = None) -> None:
        """Make a new bank: a copy of the nearest domain's experts if that is close, else fresh ones.

        Fresh experts have a random A, B zero, and gates at the centroids of the text's activations.

        Args:
            neighbours: Stored domains, nearest first.
            beside: Experts of the domain that stay frozen; the new ones are the next generation.
        """
        assert self.bank_config is not None
        weights = None
        if self.bank_config.schedule == "data":
            layers = self._bearing_layers(self.bank_config)
            weights = activation_weights(self.base.model, self.blocks, layers=layers)
        self.frozen = beside
        self.bank = new_bank(
            self.base.model,
            self.base.layout,
            self.bank_config,
            generator=torch.Generator().manual_seed(self.training.seed),
            weights=weights,
            older=beside.experts if beside else (),
            targets=self.base.targets,
        )
        nearest = neighbours[0] if neighbours else None
        if nearest and nearest.similarity >= MIN_SIMILARITY:
            donor = read_pack(self.store, self.others[nearest.name]).bank
            if can_copy_experts(donor, self.bank):
                copy_experts(donor, self.bank)
                self.copied_from = nearest.name
                self._lender = self.others[nearest.name].digest
                return
        seed_expert_gates(self.bank, self.base.model, self.blocks)

    def keep_text(self, older: RoutingData) -> None:
        """Add the text of an older version to what the new one is routed by.

        Raises:
            IncompatibleError: It was measured for another edition of the router, whose features cannot be computed.
        """
        before, now = one_edition([older, self._routing_data(all_tokens=True)], self.width)
        shares = [before.statistics.rows, now.statistics.rows]
        self.prototypes = join_prototypes([before.prototypes, now.prototypes], shares)
        self.statistics, self.temperatures = before.statistics + now.statistics, now.temperatures

    def _check_settings(self, bank: BankConfig) -> None:
        """Refuse what the base model has no room for.

        Raises:
            InputError: Names the setting, both values, and one that fits.
        """
        longest = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None)
        if bank.rank > self.width:
            raise InputError(
                f"Experts of rank {bank.rank:,} are wider than the base model.",
                cause=f"its hidden size is {self.width:,}: a higher rank adds nothing",
                fix=f"choose --rank {self.width} or less",
            )
        if longest is not None and self.training.block > longest:
            raise InputError(
                f"Blocks of {self.training.block:,} tokens are longer than the base model reads.",
                cause=f"it reads {longest:,} tokens",
                fix=f"choose --block {longest} or less",
            )
        self._bearing_layers(bank)

    def _check_first_layer(self, bank: BankConfig, preservation: DomainPack) -> None:
        """Refuse experts before the layer whose input the router reads: they would change what it reads.

        Raises:
            InputError: There would be some.
        """
        first = self._bearing_layers(bank)[0]
        if first < preservation.feature_layer:
            raise InputError(
                f"expert_free is too small: {bank.expert_free}.",
                cause=f"experts would begin in layer {first}, those of KP begin in layer {preservation.feature_layer}",
                fix=f"choose at least {preservation.feature_layer / self.base.layout.count:g}",
            )

    # --- train ---

    def train(self) -> None:
        """Train the bank in the composition of KP and its domain, and prove that nothing else changed.

        Raises:
            IntegrityError: Something frozen was trainable or has changed, or the loss is not finite. Nothing is stored.
        """
        if self.preservation is None:
            stack = Stack(names=(self.name,), banks=(self.bank,), trainable=True)
            composed = attach(self.base.model, stack, router=None, fixed=torch.ones(1))
        else:
            banks = (self.preservation.bank, *filter(None, [self.frozen]), self.bank)
            router = base_router(
                [self.preservation, self._routing_data()], torch.tensor([KP_PRIOR, 1 - KP_PRIOR]), self.base
            )
            stack = Stack(names=(GENERAL, self.name), banks=banks, trainable=True)
            composed = attach(self.base.model, stack, router=router)
        trained, self.proof, self.figures = train_frozen(
            composed,
            self.blocks,
            self.training,
            validation=self.validation,
            base=self.base.model,
            store=self.store,
            folder=self.folder,
            stage=f"training {self.name}",
            on_progress=self.on_progress,
        )
        self.finish(extend_bank(self.frozen, trained) if self.frozen else trained)

    def finish(self, bank: ExpertBank) -> None:
        """Set the result: the bank, with the text's statistics and prototypes."""
        self.pack = self._packed(bank)

    def _packed(self, bank: ExpertBank) -> DomainPack:
        return DomainPack(
            bank=bank,
            statistics=self.statistics.without_rare_tokens(),
            prototypes=self.prototypes,
            temperatures=self.temperatures,
            feature_layer=self.feature_layer,
        )

    def _routing_data(self, *, all_tokens: bool = False) -> RoutingData:
        """Return what routes the bank in training: the statistics that will be stored, or those of all tokens."""
        return RoutingData(
            statistics=self.statistics if all_tokens else self.statistics.without_rare_tokens(),
            prototypes=self.prototypes,
            temperatures=self.temperatures,
            feature_layer=self.feature_layer,
            first_layer=self.feature_layer,
        )

    def _usual_temperatures(self) -> Temperatures:
        """Return the temperatures of the edition of the router that the KP bank was made for."""
        if self.preservation is None or self.preservation.temperatures.is_weighted:
            return Temperatures()
        given = self.preservation.temperatures
        return FIRST_EDITION if given.is_first_edition else given

    # --- commit ---

    @property
    def resumed_from(self) -> int:
        """The step of the checkpoint that training was resumed from; 0 if there was none."""
        return self.figures["resumed_from"]

    def stored_version(self) -> PackManifest | None:
        """Return the version that this very run stored before, unless it was removed."""
        versions = (self.store.manifest(self.name, number) for number in reversed(self.store.versions(self.name)))
        return next((manifest for manifest in versions if manifest.train.get("run") == self.folder.name), None)

    def commit(
        self,
        scores: DomainScores | None,
        *,
        train: Mapping[str, Any] | None = None,
        schedule: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
        proof: Mapping[str, Any] | None = None,
        first_only: bool = True,
        alias: str | None = LATEST,
    ) -> PackManifest:
        """Store the version, then discard the run's checkpoints.

        Args:
            scores: On the held-out set, if there is one.
            train: What the manifest records about the origin of a bank that was not trained here.
            schedule: The allocation schedule to record, if not that of the settings.
            evaluation: What the manifest records beside the scores.
            lineage: What it records beside the KP version.
            proof: What it records beside the frozen proof.
            first_only: Refuse if the domain has a version already.
            alias: The alias that moves to the new version; None holds it back.

        Raises:
            ConflictError: `first_only`, and another process stored a version first.
        """
        bank = self.pack.bank
        draft = PackManifest(
            name=self.name,
            role="preservation" if self.preservation is None else "domain",
            description=self.spec.description,
            license=self.spec.license,
            base=self.record,
            experts=expert_records(bank),
            allocation={
                "schedule": schedule or (self.bank_config and self.bank_config.schedule),
                "counts": list(bank.counts(self.base.layout.count)),
            },
            lineage={"parent": None, "preservation": self._lineage(), **(lineage or {})},
            train={
                "run": self.folder.name,
                "data": self.data.record,
                **({"chat": True} if self.is_chat else {}),  # without it, prompts are read as plain text
                **(train or self._train_record()),
            },
            evaluation={**(scores.as_json() if scores else {}), **(evaluation or {})},
            proof={**self.proof, **(proof or {})},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tool=tool_record(),
        )
        files = pack_files(self.pack, layout=self.base.layout, base_id=self.record.id, revision=self.record.revision)
        keep_rare_tokens(self.folder, self.statistics)
        manifest = self.store.commit(draft, files, first_only=first_only, alias=alias)
        self._write_record({"state": "done", "version": manifest.version})
        discard_checkpoints(self.folder)
        (self.folder / ORDER_FILE).unlink(missing_ok=True)
        return manifest

    def _train_record(self) -> dict[str, Any]:
        assert self.bank_config is not None
        bank = asdict(self.bank_config)
        targets = self.bank_config.targets
        return {
            "bank": bank | {"targets": None if targets is None else list(targets)},
            "settings": asdict(self.training),
            "dtype": self._dtype,
            "losses": self.figures["losses"],
            "tokens": self.figures["tokens"],
            "steps": self.figures["steps"],
            "warm_start": self._lender,
            "seconds": self.figures["seconds"],
            **({"validation": self.figures["validation"]} if "validation" in self.figures else {}),
        }

    def _lineage(self) -> dict[str, Any] | None:
        manifest = self._preservation_manifest
        return None if manifest is None else {"version": manifest.version, "digest": manifest.digest}

    def _discard_other_order(self) -> None:
        """Discard checkpoints of the same rows in another order: resuming them would train some rows twice."""
        digests = b"".join(example.digest() for example in self.data.train)
        order, path = canonical_json({"rows": sha256_of(digests)}), self.folder / ORDER_FILE
        if path.is_file() and path.read_bytes() != order:
            discard_checkpoints(self.folder)
        write_sealed(path, order)

    def _write_record(self, state: Mapping[str, Any]) -> None:
        """Record, for this machine only, where the data was read, so that its held-out rows can be found again."""
        record = {"name": self.name, "sources": list(self._kept_sources), **state}
        write_sealed(self.folder / "run.json", canonical_json(record))

    @cached_property
    def _kept_sources(self) -> tuple[str, ...]:
        """Where the data can be read again; rows that were given in memory are written to the run's folder."""
        kept = []
        for number, source in enumerate(self.data.sources, start=1):
            if isinstance(source, RowList):
                path = self.folder.resolve() / f"rows-{number}.jsonl"
                write_sealed(path, source.to_jsonl())
                kept.append(str(path))
            else:
                kept.append(source)
        return tuple(kept)


def tool_record() -> dict[str, str]:
    """Return the versions of the programs that make a version."""
    return {
        "name": TOOL,
        "version": version(TOOL),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
