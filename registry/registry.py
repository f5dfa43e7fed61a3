"""Registry: the front door. One object for everything a person does with a registry.

    r = Registry.open()
    model = r.compose("medicine+general")      # an ordinary transformers model
    print(r.generate(model, "What is anaemia?").text)

Opening one, listing and showing read manifests only; torch is imported when a model is first needed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.composition import GENERAL, parse_reference
from ..domains.errors import ConflictError, IntegrityError
from ..domains.progress import OnProgress, silent
from .base.find import POCKET, find_base
from .base.fingerprint import fingerprint
from .compose.plan import Plan, plan_composition
from .compose.saved import is_saved_composition, open_plan, save_composition
from .store.manifest import BaseRecord, PackManifest
from .store.store import Store, locate_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..adapters.config import BankConfig, TrainingConfig
    from ..domains.data.corpus import Source
    from .base.load import LoadedBase
    from .compose.generate import Answer
    from .compose.route import RouteReport
    from .hub.pull import PullResult
    from .hub.push import PushResult
    from .hub.remote_terms import ResolvedComposition
    from .interop.export_plan import ExportResult
    from .interop.import_adapter import ImportResult
    from .learn.add_domain import AddedDomain
    from .learn.retrain import Retrained
    from .learn.train import OnNeighbours
    from .measure.evaluate import DomainScores
    from .measure.report import RetentionReport


class Registry:
    """A store and the base model it belongs to."""

    def __init__(self, store: Store, *, device: str = "cpu", dtype: str = "auto"):
        self.store = store
        self.device = device
        self.dtype = dtype
        self._base: LoadedBase | None = None

    @classmethod
    def init(
        cls,
        path: str | Path | None = None,
        *,
        base: str = POCKET,
        revision: str | None = None,
        data: "Sequence[Source]" = (),
        bank: "BankConfig | None" = None,
        training: "TrainingConfig | None" = None,
        device: str = "cpu",
        dtype: str = "auto",
        on_progress: OnProgress = silent,
    ) -> "Registry":
        """Creates a registry for a base model and trains its KP bank; resumes if that was interrupted.

        Args:
            path: Its folder; found like `open` finds it if not given.
            base: `pocket`, a folder, or a Hub id.
            revision: A commit of the Hub model.
            data: General text for the KP bank; the bundled corpus if not given.

        Raises:
            ConflictError: There is a complete registry already, or an unfinished one for another base.
        """
        folder = find_base(base, revision=revision)
        root = locate_store(path, os.environ, Path.cwd())
        record = fingerprint(folder, source=base, revision=revision)
        settings = {
            "source": base if base == POCKET or not Path(base).is_dir() else str(folder),
            "base": {key: value for key, value in asdict(record).items() if key != "extra"},
        }
        try:
            store = Store.create(root, settings)
        except ConflictError:
            store = Store.open(root)
            if store.versions(GENERAL) or store.settings != settings:
                raise
        registry = cls(store, device=device, dtype=dtype)
        from .learn.add_domain import train_preservation

        train_preservation(
            store, registry.base, record, data=data, bank=bank, training=training, on_progress=on_progress
        )
        return registry

    @classmethod
    def open(cls, path: str | Path | None = None, *, device: str = "cpu", dtype: str = "auto") -> "Registry":
        """The registry in a folder: as asked, $LORARY_STORE, the nearest `.lorary` above, or the user's own.

        Raises:
            NotFoundError: There is none.
        """
        return cls(Store.open(locate_store(path, os.environ, Path.cwd())), device=device, dtype=dtype)

    @property
    def base_record(self) -> BaseRecord:
        """The base model that this registry was made for."""
        return BaseRecord(**self.store.settings["base"])

    @property
    def base(self) -> "LoadedBase":
        """The base model, loaded on first use, after its files were checked against the fingerprint.

        Raises:
            IncompatibleError: The files are not those that the registry was made for.
        """
        if self._base is None:
            from .base.load import open_base

            self._base = open_base(self.store, self.base_record, device=self.device, dtype=self.dtype)
        return self._base

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer."""
        return self.base.tokenizer

    def domains(self) -> list[PackManifest]:
        """The latest version of every stored domain, KP's first."""
        manifests = [self.store.manifest(name) for name in self.store.domains()]
        return sorted(manifests, key=lambda manifest: (manifest.name != GENERAL, manifest.name))

    def manifest(self, reference: str) -> PackManifest:
        """The manifest that `name`, `name@2` or `name@alias` means.

        Raises:
            NotFoundError: There is no such domain or version.
        """
        return self.store.manifest(*parse_reference(reference))

    def remove(self, reference: str) -> PackManifest:
        """Remove a version; see `lorary.registry.store.store.Store.remove`."""
        return self.store.remove(reference)

    def restore(self, reference: str) -> PackManifest:
        """Restore a removed version; see `lorary.registry.store.store.Store.restore`."""
        return self.store.restore(reference)

    def resolve_composition(self, composition: str, *, on_progress: OnProgress = silent) -> "ResolvedComposition":
        """A composition in the names of this registry: what it names on the Hub, hf://owner/repo@v2, is pulled."""
        from .hub.remote_terms import ResolvedComposition, has_remote_terms, resolve_composition

        if not has_remote_terms(composition):
            return ResolvedComposition(composition)
        return resolve_composition(self.store, self.base_record, composition, on_progress=on_progress)

    def plan(self, composition: str, *, static: bool = False) -> Plan:
        """What a composition will be; reads manifests only, and pulls what is named on the Hub.

        Takes a saved composition's folder as well.
        """
        composition = self.resolve_composition(composition).composition
        if is_saved_composition(composition):
            return open_plan(Path(composition), base=self.base_record)
        return plan_composition(self.store, composition, base=self.base_record, static=static)

    def compose(self, composition: str, *, static: bool = False) -> "PreTrainedModel":
        """An ordinary transformers model: the base with the composition's experts in one fused layer.

        Models composed by one registry share the base in memory and see nothing of each other.

        Args:
            composition: `medicine+general`, `medicine@2:0.7+legal:0.3`, or a saved composition's folder.
            static: Constant gates instead of routing.

        Raises:
            NotFoundError, IncompatibleError, IntegrityError, InputError: See `plan` and the verification of packs.
        """
        from .compose.build import compose_model, compose_saved

        composition = self.resolve_composition(composition).composition
        plan = self.plan(composition, static=static)
        if is_saved_composition(composition):
            return compose_saved(Path(composition), plan, self.base)
        return compose_model(self.store, plan, self.base)

    def save(self, composition: str, out: str | Path, *, static: bool = False) -> Path:
        """Saves a composition, complete but for the base model, into a new folder."""
        composition = self.resolve_composition(composition).composition
        plan = plan_composition(self.store, composition, base=self.base_record, static=static)
        return save_composition(self.store, plan, Path(out))

    def add_domain(
        self,
        name: str,
        *,
        data: "Sequence[Source]" = (),
        bank: "BankConfig | None" = None,
        training: "TrainingConfig | None" = None,
        on_neighbours: "OnNeighbours" = lambda _neighbours: None,
        on_progress: OnProgress = silent,
    ) -> "AddedDomain":
        """Trains new experts for a domain, everything else frozen and proved so, and stores them as version 1.

        Args:
            name: A built-in domain, or any name together with `data`.
            data: Files, or `hf:` data sets.
            on_neighbours: Told which stored domains are like this one, nearest first, before training begins.

        Raises:
            LoraryError: See `lorary.registry.learn.add_domain.add_domain`; nothing is stored then.
        """
        from ..adapters.config import BankConfig, TrainingConfig
        from .learn.add_domain import add_domain

        with self._base_in_doubt():
            return add_domain(
                self.store,
                self.base,
                self.base_record,
                name,
                data=data,
                bank=bank or BankConfig(),
                training=training or TrainingConfig(),
                on_neighbours=on_neighbours,
                on_progress=on_progress,
            )

    def retrain(
        self,
        reference: str,
        *,
        data: "Sequence[Source]",
        training: "TrainingConfig | None" = None,
        on_progress: OnProgress = silent,
        **options: Any,
    ) -> "Retrained":
        """Trains the next version of a domain on new text; `latest` moves to it unless the gate holds it back.

        Args:
            reference: The parent: a domain's latest version, or `name@2`.
            data: Files, or `hf:` data sets, of the new text alone.
            options: `mode`, `bank`, `gate_data`, `tolerance`: see `lorary.registry.learn.retrain_plan.plan_retraining`.

        Raises:
            LoraryError: See `lorary.registry.learn.retrain.retrain`; nothing is stored then.
        """
        from .learn.retrain_plan import plan_retraining

        plan = plan_retraining(self.store, self.manifest(reference), data, **options)
        from ..adapters.config import TrainingConfig
        from .learn.retrain import retrain

        settings = training or TrainingConfig()
        with self._base_in_doubt():
            return retrain(self.store, self.base, self.base_record, plan, training=settings, on_progress=on_progress)

    @contextmanager
    def _base_in_doubt(self) -> Iterator[None]:
        """After a broken proof the base in memory may be what changed: it is read and checked anew on the next use."""
        try:
            yield
        except IntegrityError:
            self._base = None
            raise

    def push(
        self, reference: str, destination: str | None = None, *, on_progress: OnProgress = silent, **wishes: Any
    ) -> "PushResult":
        """Brings a version to the Hub: one commit, the tag vN, a model card. Again, it changes nothing.

        Args:
            reference: `name`, `name@2` or `name@alias`.
            destination: owner/repo, an owner, or nothing: your own lorary-NAME.
            on_progress: Told when the Hub lets us wait.
            **wishes: private, create_pr, dry_run, message, sign; see `lorary.registry.hub.push.PushOptions`.
        """
        from .hub.client import Hub
        from .hub.push import PushOptions, push

        hub = Hub(on_progress=on_progress)
        return push(self.store, self.manifest(reference), destination, PushOptions(**wishes), hub=hub)

    def pull(
        self,
        source: str,
        *,
        revision: str | None = None,
        name: str | None = None,
        offline: bool = False,
        signer: Path | None = None,
        on_progress: OnProgress = silent,
    ) -> "PullResult":
        """Brings a pack of the Hub into the registry, proved sound, as one version. Again, it changes nothing.

        Args:
            source: hf://owner/repo@revision; prefix and revision may be missing.
            revision: A branch, tag or commit, if `source` has none.
            name: The domain that it becomes, if not of its own name.
            offline: Whether only the Hub's cache on this machine is read.
            signer: The public key of whoever must have signed it.
        """
        from .hub.client import Hub
        from .hub.pull import parse_source, pull

        ref, hub = parse_source(source, revision), Hub(offline=offline, on_progress=on_progress)
        return pull(self.store, self.base_record, ref, hub=hub, name=name, signer=signer, on_progress=on_progress)

    def import_adapter(
        self,
        name: str,
        adapter: str | Path,
        *,
        data: "Sequence[Source]" = (),
        same_base: bool = False,
        on_progress: OnProgress = silent,
    ) -> "ImportResult":
        """Makes a LoRA adapter that PEFT saved a new domain, exactly; see `lorary.registry.interop.import_adapter`."""
        from .interop.import_plan import plan_import

        what = plan_import(self.store, name, str(adapter), data, base=None if same_base else self.base_record)
        from .interop.import_adapter import import_adapter

        return import_adapter(self.store, self.base, self.base_record, what, on_progress=on_progress)

    def export(
        self, composition: str, out: str | Path, *, to: str, static: bool = False, served_base: str | None = None
    ) -> "ExportResult":
        """Writes `peft`, `vllm`, `merged` or `tar`, which others load, to a new place."""
        from .interop.export_plan import export_archive, static_plan

        if to == "tar":
            return export_archive(self.store, self.manifest(composition), Path(out))
        composition = self.resolve_composition(composition).composition
        plan = static_plan(self.plan, composition, static=static, to=to)
        from .compose.build import packs_of
        from .interop.export import export_composition

        packs = packs_of(self.store, composition, plan)
        return export_composition(plan, packs, self.base, Path(out), to=to, served_base=served_base)

    def generate(self, model: "PreTrainedModel", prompt: str, **options: Any) -> "Answer":
        """The model's continuation of a prompt, with the route it took."""
        from .compose.generate import generate

        return generate(model, self.tokenizer, prompt, **options)

    def route(self, text: str, composition: str | None = None) -> "RouteReport":
        """Which domain would take a text, with margin and nearest prototypes; among all domains if none are named."""
        from .compose.build import packs_of
        from .compose.route import route_text

        composition = composition or "+".join([GENERAL, *(n for n in self.store.domains() if n != GENERAL)])
        composition = self.resolve_composition(composition).composition
        plan = self.plan(composition)
        return route_text(plan, packs_of(self.store, composition, plan), self.base, text)

    def evaluate(
        self,
        composition: str,
        *,
        data: "Sequence[Source]" = (),
        questions: bool = True,
        on_progress: OnProgress = silent,
    ) -> "dict[str, DomainScores]":
        """Scores every domain of a composition on its held-out text: base, own experts alone, routed.

        Args:
            data: Held-out text of the composition's only domain, instead of what was held out when it was added.
            questions: Whether the questions of built-in domains are answered too.
        """
        from .measure.evaluate import evaluate_composition

        composition = self.resolve_composition(composition).composition
        plan, model = self.plan(composition), self.compose(composition)
        return evaluate_composition(
            self.store, plan, model, self.base, data=data, with_questions=questions, on_progress=on_progress
        )

    def retention(self, domains: Sequence[str] = (), **options: Any) -> "RetentionReport":
        """What became of each domain after each step; see `lorary.registry.measure.reporting.report_retention`."""
        from .measure.reporting import report_retention

        machine = {"device": self.device, "dtype": self.dtype}
        return report_retention(self.store, lambda: self.base, self.base_record, domains, machine=machine, **options)
