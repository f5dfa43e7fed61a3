"""Manifest of a pack: its files, experts, lineage, training record and base model.

A pack is one version of one domain. Its manifest lists every other file by path, size and digest, so a trusted manifest
is enough to verify the whole pack. Round trip, for every manifest:

    PackManifest.from_json(manifest.to_json(), source="...") == manifest
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from ...adapters.composition import GENERAL
from ...domains.errors import IncompatibleError, NotFoundError
from ...domains.names import WINDOWS_NAMES, check_name, is_name
from .blobs import is_digest, sha256_of
from .strict_json import (
    EXTRA,
    MAX_BYTES,
    JsonObject,
    canonical_json,
    field_names,
    later,
    minor_of,
    parse_json,
    rare,
    record_from_json,
    record_to_json,
)

SCHEMA: Final = "lorary.pack/1"
MANIFEST_FILE: Final = "lorary.json"  # the manifest's own name in a pack folder
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # at the root, and of an expert
ROUTER_TENSORS, ROUTER_CONFIG = "router/router.safetensors", "router/router.json"
ROLES: Final = ("domain", "preservation")
DRIFT_EPSILON: Final = 0.05  # largest routing weight a new domain may take from an older one without a warning
NO_ROUTING: Final = "none"  # of an adapter that was imported without text: its weight in a composition is constant
METHODS: Final = ("lora", "rslora")
MAX_PATH: Final = 255  # characters

_PATH_PART = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class PackFile:
    """One file of a pack."""

    path: str  # inside the pack: relative, with forward slashes
    size: int  # bytes
    sha256: str  # digest of its bytes, "sha256:..."
    kind: str  # what it is for: expert, router, adapter, evaluation, card
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_path(self.path)
        _require(self.size >= 0, "size", self.size)
        _require(is_digest(self.sha256), "sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """Base model that the experts of a pack were trained on; other weights are refused."""

    id: str  # Hub id, or the name of a built-in model
    revision: str | None  # Hub commit; None for a model from a folder
    architecture: str  # model class, such as LlamaForCausalLM
    weights: str  # digest
    tokenizer: str  # digest
    chat_template: str | None  # digest; None where the tokenizer has no template
    dtype: str  # such as bfloat16
    quantization: str | None = rare(None)  # such as "bitsandbytes nf4"; missing for ordinary weights
    # digest of what the tokenizer's configs say; missing from older records, which say nothing about it
    tokenizer_settings: str | None = rare(None)
    # tokens that the chat template writes, which carry no evidence in routing; missing without a template
    template_tokens: tuple[int, ...] = rare(())
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(is_digest(self.weights), "weights", self.weights)
        _require(is_digest(self.tokenizer), "tokenizer", self.tokenizer)
        _require(self.chat_template is None or is_digest(self.chat_template), "chat_template", self.chat_template)
        settings = self.tokenizer_settings
        _require(settings is None or is_digest(settings), "tokenizer_settings", settings)
        object.__setattr__(self, "template_tokens", tuple(self.template_tokens))
        _require(all(token >= 0 for token in self.template_tokens), "template_tokens", self.template_tokens)


@dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """One expert of the bank."""

    id: str
    rank: int
    alpha: float
    method: str  # lora: scale = alpha / rank; rslora: scale = alpha / sqrt(rank)
    targets: tuple[str, ...]  # target modules, such as q_proj
    layers: tuple[int, ...]  # decoder layers where it is present
    parameters: int
    generation: int = later(0)  # experts that were added together share a softmax of expert gates
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.alpha))
        _require(_PATH_PART.fullmatch(self.id) is not None and self.id.strip(".") != "", "id", self.id)
        _require(self.rank >= 1, "rank", self.rank)
        _require(math.isfinite(self.alpha) and self.alpha > 0, "alpha", self.alpha)
        _require(self.method in METHODS, "method", self.method)
        _require(all(layer >= 0 for layer in self.layers), "layers", self.layers)
        _require(self.parameters >= 0, "parameters", self.parameters)
        _require(self.generation >= 0, "generation", self.generation)


@dataclass(frozen=True, kw_only=True)
class PackManifest:
    """Manifest of a pack; a draft has version 0 and no files until it is committed to a store.

    Raises:
        InputError: The name breaks the grammar of domain names.
        ValueError: Another value is out of range; the message names the key.
    """

    name: str
    version: int = 0
    role: str  # domain or preservation
    description: str
    license: str
    base: BaseRecord
    files: tuple[PackFile, ...] = ()
    experts: tuple[ExpertRecord, ...]
    allocation: dict[str, Any]  # schedule, and the number of experts of each decoder layer
    lineage: dict[str, Any]  # the version this one came from
    train: dict[str, Any]  # data digests, seed, settings, seconds
    evaluation: dict[str, Any]
    proof: dict[str, Any]  # digests of frozen tensors before and after
    created: str  # time, ISO 8601 in UTC
    tool: dict[str, Any]  # versions of the programs that made it
    schema: str = SCHEMA
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        _require(self.version >= 0, "version", self.version)
        _require(self.role in ROLES, "role", self.role)
        _check_paths([file.path for file in self.files])
        _require(not _repeated(expert.id for expert in self.experts), "experts", "two with the same id")
        _check_generations([expert.generation for expert in self.experts])
        _check_extra(self)

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> "PackManifest":
        """Read a manifest; `source` names it in errors.

        Raises:
            IncompatibleError: Its schema has a different major version.
            IntegrityError: It is not valid JSON, or a key is missing, unknown or invalid.
        """
        value = parse_json(data, source=source)
        schema = value.get("schema") if isinstance(value, dict) else None
        minor = minor_of(schema, known=SCHEMA, source=source)
        return record_from_json(cls, value, source=source, keeps_unknown=minor > 0)

    def to_json(self) -> bytes:
        """Return the manifest as canonical JSON.

        Raises:
            ValueError: A value cannot be represented in JSON, or the manifest is larger than `from_json` accepts.
        """
        data = canonical_json(record_to_json(self))
        _require(len(data) <= MAX_BYTES, "files", f"a manifest of {len(data)} bytes; at most {MAX_BYTES} are read")
        return data

    @property
    def digest(self) -> str:
        """Digest of the content: equal for equal data, seed and settings, independent of time, machine and version.

        The proof is left out: it depends on the other packs stored when the pack was made.
        """
        content = record_to_json(self)
        for key in ("created", "proof", "tool", "version"):
            del content[key]
        content["train"] = {key: value for key, value in self.train.items() if key != "seconds"}
        return sha256_of(canonical_json(content))

    @property
    def made_with(self) -> str:
        """Programs that made the pack, with their versions: `lorary 0.1.0, torch 2.9.0, ...`."""
        tool = dict(self.tool)
        named = {str(tool.pop("name", "lorary")): tool.pop("version", "?")}
        return ", ".join(f"{name} {version}" for name, version in {**named, **tool}.items())

    @property
    def parent(self) -> int | None:
        """Version that this one was retrained from; None if it was trained from scratch."""
        parent = self.lineage.get("parent")
        version = parent.get("version") if isinstance(parent, dict) else None
        return version if type(version) is int else None

    @property
    def is_held_back(self) -> bool:
        """Whether the version failed its acceptance check against its parent, so that `latest` does not move to it."""
        gate = self.evaluation.get("gate")
        return isinstance(gate, dict) and gate.get("holds") is False

    @property
    def is_routed(self) -> bool:
        """Whether the router can tell the domain's text; not if it was imported without any."""
        imported = self.train.get("imported")
        return not (isinstance(imported, dict) and imported.get("routing") == NO_ROUTING)

    @property
    def named_others(self) -> tuple[str, ...]:
        """Other domains of its registry that the manifest names, as those of the first manifests do in their proof."""
        frozen = self.proof.get("frozen")
        packs = frozen.get("packs") if isinstance(frozen, dict) else None
        names = {str(reference).partition("@")[0] for reference in packs} if isinstance(packs, dict) else set()
        lender = self.train.get("warm_start")
        names |= {lender} if isinstance(lender, str) and is_name(lender) else set()
        return tuple(sorted(names - {self.name, GENERAL}))

    def file(self, path: str) -> PackFile:
        """Return the file at a path of the pack.

        Raises:
            NotFoundError: The pack has no such file.
        """
        for file in self.files:
            if file.path == path:
                return file
        raise NotFoundError(
            f"{self.name}@{self.version} has no file {path!r}.",
            cause=f"Its files: {', '.join(file.path for file in self.files) or 'none'}.",
            fix=f"See what it has: registry show {self.name}@{self.version}",
        )


def check_path(path: str) -> str:
    """Return `path` unchanged if it is a valid path of a pack file.

    Raises:
        ValueError: It is absolute, leaves the pack, is too long, has characters other than A-Z a-z 0-9 . _ - and /,
            or has a different meaning on Windows.
    """
    parts = path.split("/")
    is_plain = all(
        # Windows drops a trailing dot, and treats device names as devices whatever the suffix
        _PATH_PART.fullmatch(part) and part.rstrip(".") == part and part.partition(".")[0].lower() not in WINDOWS_NAMES
        for part in parts
    )
    _require(is_plain and len(path) <= MAX_PATH, "path", path)
    return path


def _check_paths(paths: list[str]) -> None:
    """Raise ValueError if paths clash, also on a case-insensitive file system."""
    folded = [path.lower() for path in paths]
    folders = {str(parent) for path in folded for parent in PurePosixPath(path).parents}
    clashes = _repeated(folded) | folders.intersection(folded) | {MANIFEST_FILE}.intersection(folded)
    _require(not clashes, "files", f"{', '.join(sorted(clashes))} more than once, also as a folder")


def _check_generations(generations: list[int]) -> None:
    """Raise ValueError unless experts are in the order in which they were added, as their ranks are."""
    in_order = sorted(generations)
    has_gap = set(in_order) != set(range(len(set(in_order))))
    _require(generations == in_order and not has_gap, "generation", generations)


def _check_extra(manifest: PackManifest) -> None:
    """Raise ValueError if there are extra keys, unless the schema is a newer minor version and none clashes."""
    is_newer = minor_of(manifest.schema, known=SCHEMA, source=f"The manifest of {manifest.name}") > 0
    for record in (manifest, manifest.base, *manifest.files, *manifest.experts):
        clashes = set(field_names(type(record))).intersection(record.extra)
        refused = clashes if is_newer else set(record.extra)
        _require(not refused, EXTRA, sorted(refused))


def _repeated(values: Iterable[str]) -> set[str]:
    return {value for value, count in Counter(values).items() if count > 1}


def _require(holds: bool, key: str, value: object) -> None:
    if not holds:
        text = repr(value)
        raise ValueError(f"{key} cannot be {text if len(text) <= 300 else text[:300] + '...'}")


def check_same_base(*, wanted: BaseRecord, found: BaseRecord, what: str) -> None:
    """Raise IncompatibleError if experts belong to another base model.

    Raises:
        IncompatibleError: Quantisation, architecture, weights, tokenizer, its settings or the chat template differ; the
            message has both values. Records of before the settings were read fit any.
    """
    if wanted.quantization != found.quantization:
        raise IncompatibleError(
            f"{what} belongs to a base model in another quantisation.",
            cause=f"expected {wanted.id!r}, {wanted.quantization or 'not quantised'};"
            f" found {found.id!r}, {found.quantization or 'not quantised'}",
            fix=f"use the base model it was trained on: {wanted.id}",
        )
    for part in ("architecture", "weights", "tokenizer", "tokenizer_settings", "chat_template"):
        expected, actual = getattr(wanted, part), getattr(found, part)
        if part == "tokenizer_settings" and None in (expected, actual):
            continue
        if expected != actual:
            fix = f"use the base model it was trained on: {wanted.id}"
            if wanted.id == found.id:
                fix = "restore the base model's files, or make a new registry: registry init OTHER-FOLDER"
            raise IncompatibleError(
                f"{what} belongs to another base model.",
                cause=f"{part}: expected that of {wanted.id!r}, {_short(expected)};"
                f" found that of {found.id!r}, {_short(actual)}",
                fix=fix,
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 72 else text[:69] + "..."
