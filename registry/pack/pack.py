"""Conversion between a domain's bank and router data and the files of a pack.

    experts/<id>/adapter_config.json + adapter_model.safetensors    one expert as an ordinary PEFT adapter
    adapter_config.json + adapter_model.safetensors                 the whole bank with constant gates, as another
    router/router.safetensors + router.json                         statistics, prototypes, gates, temperatures

Bytes are verified against the manifest's digests before they are parsed. Tensors whose names or shapes do not fit the
manifest are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.bank import Expert, ExpertBank, LayerExperts, concat_layers
from ...adapters.layer.gates import TEMPERATURE
from ...adapters.router.router import FIRST_EDITION, Temperatures
from ...domains.base_model import ModelLayout
from ...domains.data.catalog import ORDINARY_TEXT
from ...domains.errors import IncompatibleError, IntegrityError
from ...domains.statistics.hashing import feature_projection
from ...domains.statistics.statistics import FIRST_PROJECTION_SEED, DomainStatistics, first_projection
from ...domains.statistics.token_roles import COMMON_SHARE
from ..store.blobs import sha256_of
from ..store.manifest import ADAPTER_CONFIG, ADAPTER_TENSORS, ROUTER_CONFIG, ROUTER_TENSORS, ExpertRecord, PackManifest
from ..store.strict_json import canonical_json, parse_json
from .pack_source import PackSource
from .peft_config import bank_config, expert_config, parse_key, tensor_key
from .tensor_file import load_tensors, save_tensors

ROUTER_SCHEMA = "lorary.router/2.2"
SECOND_ROUTER_SCHEMA = "lorary.router/2.1"  # all tokens' features weigh the same
FIRST_ROUTER_SCHEMA = "lorary.router/2"
MAX_WIDTH = 1 << 17  # of a hidden state
MAX_HALF_LIFE = 1e9  # tokens

PackFiles = dict[str, tuple[bytes, str]]  # path to bytes and kind


@dataclass(frozen=True, kw_only=True)
class DomainPack:
    """One version of a domain, in memory."""

    bank: ExpertBank
    statistics: DomainStatistics
    prototypes: Tensor  # (prototypes, features), unit vectors
    temperatures: Temperatures
    feature_layer: int  # decoder layer whose input the features are taken from

    @property
    def first_layer(self) -> int:
        """First decoder layer that has experts."""
        return self.bank.first_layer

    def routing(self) -> "RoutingData":
        """Return what routing needs of the pack."""
        return RoutingData(
            statistics=self.statistics,
            prototypes=self.prototypes,
            temperatures=self.temperatures,
            feature_layer=self.feature_layer,
            first_layer=self.first_layer,
        )


@dataclass(frozen=True, kw_only=True)
class RoutingData:
    """Part of a pack that routing and neighbour search need: everything except the experts."""

    statistics: DomainStatistics
    prototypes: Tensor
    temperatures: Temperatures
    feature_layer: int
    first_layer: int

    def routing(self) -> "RoutingData":
        """Return these."""
        return self

    @property
    def is_first_edition(self) -> bool:
        """Whether the pack was made for the first edition of the router."""
        return self.temperatures.is_first_edition

    def first_edition(self, width: int) -> "RoutingData":
        """Return what routes a pack of the second edition beside packs of the first.

        Raises:
            IncompatibleError: The features of the first edition cannot be computed.
        """
        if self.is_first_edition:
            return self
        projection = first_projection(width)
        statistics = self.statistics.first_edition(width)
        prototypes = self.prototypes if projection is None else F.normalize(self.prototypes @ projection.T, dim=-1)
        return replace(self, statistics=statistics, prototypes=prototypes, temperatures=FIRST_EDITION)


def one_edition(packs: Sequence["Routable"], width: int) -> list[RoutingData]:
    """Return the routing data of packs that are routed together, all of the oldest edition among them.

    Raises:
        IncompatibleError: The features of the first edition cannot be computed.
    """
    found = [pack.routing() for pack in packs]
    if any(one.is_first_edition for one in found):
        return [one.first_edition(width) for one in found]
    if all(one.temperatures.is_weighted for one in found):
        return found
    # means of weighted features are near enough to those of features that all weigh the same
    return [replace(one, temperatures=replace(one.temperatures, is_weighted=False)) for one in found]


Routable = DomainPack | RoutingData


def pack_files(pack: DomainPack, *, layout: ModelLayout, base_id: str, revision: str | None) -> PackFiles:
    """Return every file of the pack except the manifest."""
    files: PackFiles = {}
    for expert in pack.bank.experts:
        folder = f"experts/{expert.id}"
        config = expert_config(pack.bank, expert, layout=layout, base_id=base_id, revision=revision)
        files[f"{folder}/{ADAPTER_CONFIG}"] = (canonical_json(config), "expert")
        files[f"{folder}/{ADAPTER_TENSORS}"] = (save_tensors(_expert_tensors(pack.bank, expert, layout)), "expert")
    config = bank_config(pack.bank, layout=layout, base_id=base_id, revision=revision)
    files[ADAPTER_CONFIG] = (canonical_json(config), "adapter")
    files[ADAPTER_TENSORS] = (save_tensors(merged_tensors(pack.bank, layout)), "adapter")
    files[ROUTER_TENSORS] = (save_tensors(_router_tensors(pack)), "router")
    files[ROUTER_CONFIG] = (canonical_json(_router_config(pack, layout)), "router")
    return files


def read_pack(files: PackSource, manifest: PackManifest) -> DomainPack:
    """Read the pack of a version; every file is verified before it is parsed.

    Raises:
        IntegrityError: A file differs from its digest, or tensors do not fit the manifest.
    """
    source = f"{manifest.name}@{manifest.version}"
    router, config = _read_router(files, manifest)
    bank = ExpertBank()
    for record in manifest.experts:
        _add_expert(bank, record, _load(files, manifest, f"experts/{record.id}/{ADAPTER_TENSORS}"), source)
    _add_gates(bank, router, width=config["feature_width"], source=source)
    return DomainPack(bank=bank, **_routing_fields(router, config, source))


def read_routing(files: PackSource, manifest: PackManifest) -> RoutingData:
    """Read the routing data of a version; its experts are not read.

    Raises:
        IntegrityError: A file differs from its digest, or tensors do not fit the manifest.
    """
    source = f"{manifest.name}@{manifest.version}"
    router, config = _read_router(files, manifest)
    first = min(layer for expert in manifest.experts for layer in expert.layers)
    return RoutingData(first_layer=first, **_routing_fields(router, config, source))


def expert_records(bank: ExpertBank) -> tuple[ExpertRecord, ...]:
    """Return the manifest records of the experts of a bank."""
    records = []
    for expert in bank.experts:
        tensors = _tensors_of(bank, expert)
        targets = sorted({target.rpartition(".")[2] for _, target, _ in tensors})
        size = sum(t.numel() for t in tensors.values())
        records.append(
            ExpertRecord(
                id=expert.id,
                rank=expert.rank,
                alpha=expert.alpha,
                method=expert.method,
                targets=tuple(targets),
                layers=tuple(sorted({index for index, _, _ in tensors})),
                parameters=size,
                generation=expert.generation,
            )
        )
    return tuple(records)


def _read_router(files: PackSource, manifest: PackManifest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    source = f"{manifest.name}@{manifest.version}"
    config = parse_json(files.read(manifest, ROUTER_CONFIG), source=f"{source}: {ROUTER_CONFIG}")
    _check_router_config(config, source)
    return _load(files, manifest, ROUTER_TENSORS), config


def _routing_fields(router: dict[str, Tensor], config: dict[str, Any], source: str) -> dict[str, Any]:
    return {
        "statistics": _read_statistics(
            router,
            features=config["features"],
            is_first_edition=config["schema"] == FIRST_ROUTER_SCHEMA,
            source=source,
        ),
        "prototypes": router["prototypes"],
        "temperatures": _temperatures(config),
        "feature_layer": config["feature_layer"],
    }


def _router_config(pack: DomainPack, layout: ModelLayout) -> dict[str, Any]:
    temperatures = pack.temperatures
    config = {
        **_fixed_keys(_schema(temperatures), layout.width),
        "feature_layer": pack.feature_layer,
        "feature_width": layout.width,
        "features": len(pack.statistics.feature_sum),
        "tempers": {"token": temperatures.token, "hidden": temperatures.hidden},
        "decoder_layers": layout.layers,
    }
    if not temperatures.is_first_edition:
        config["tempers"] |= {"ridge": temperatures.ridge}
        config["half_life"] = temperatures.half_life
    return config


def _schema(temperatures: Temperatures) -> str:
    if temperatures.is_first_edition:
        return FIRST_ROUTER_SCHEMA
    return ROUTER_SCHEMA if temperatures.is_weighted else SECOND_ROUTER_SCHEMA


def _fixed_keys(schema: str, width: int) -> dict[str, Any]:
    """Return what every pack of an edition says about a base model of this width."""
    edition: dict[str, Any] = {"schema": schema}
    if schema == FIRST_ROUTER_SCHEMA:
        edition["projection_seed"] = FIRST_PROJECTION_SEED
    else:
        edition["projection"] = projection_digest(width)
    if schema == ROUTER_SCHEMA:
        edition["common_tokens"] = {"share": COMMON_SHARE, "text": ordinary_text_digest()}
    return edition | {"expert_gate_temperature": TEMPERATURE}


@cache
def ordinary_text_digest() -> str:
    """Return the digest of the text in which common tokens are counted."""
    return sha256_of(b"".join(file.read_bytes() for file in ORDINARY_TEXT))


@cache
def projection_digest(width: int) -> str | None:
    """Return the digest of the signs of the projection for hidden states of this width; None if there is none."""
    projection = feature_projection(width)
    return None if projection is None else sha256_of((projection > 0).numpy().tobytes())


def _temperatures(config: dict[str, Any]) -> Temperatures:
    terms = {term: float(value) for term, value in config["tempers"].items()}
    if config["schema"] == FIRST_ROUTER_SCHEMA:
        return replace(FIRST_EDITION, **terms)
    is_weighted = config["schema"] == ROUTER_SCHEMA
    return Temperatures(**terms, half_life=float(config["half_life"]), is_weighted=is_weighted)


def _check_router_config(config: Any, source: str) -> None:
    """Raise an error if the router configuration is incompatible or invalid."""
    config = config if isinstance(config, dict) else {}
    width = config.get("feature_width")
    has_sizes = all(type(config.get(key)) is int for key in ("feature_layer", "feature_width", "features"))
    schema = config.get("schema")
    is_first = schema == FIRST_ROUTER_SCHEMA
    schema = schema if schema in (FIRST_ROUTER_SCHEMA, SECOND_ROUTER_SCHEMA) else ROUTER_SCHEMA
    known = _fixed_keys(schema, width) if has_sizes and 0 < width <= MAX_WIDTH else {}
    for key, expected in known.items():
        if config.get(key) != expected:
            raise IncompatibleError(
                f"The router of {source} is incompatible.",
                cause=f"{key}: expected {expected!r}, found {config.get(key)!r}",
                fix="use the version of this program that made it",
            )
    temperatures = config.get("tempers")
    numbers = temperatures if isinstance(temperatures, dict) else {}
    terms = {"token", "hidden"} if is_first else {"token", "hidden", "ridge"}
    has_temperatures = numbers.keys() == terms and all(type(t) in (int, float) for t in numbers.values())
    half_life = 1.0 if is_first else config.get("half_life")
    fades = type(half_life) in (int, float) and 1.0 <= half_life <= MAX_HALF_LIFE
    is_sound = known and has_temperatures and numbers["token"] > 0 and min(numbers.values()) >= 0 and fades
    if not is_sound:
        cause = (
            f"{ROUTER_CONFIG} says tempers {temperatures!r}, half_life {config.get('half_life')!r}, "
            f"feature_layer {config.get('feature_layer')!r}, feature_width {width!r}"
        )
        raise IntegrityError(f"The router of {source} cannot be used.", cause=cause)


def _read_statistics(
    router: dict[str, Tensor], *, features: int, is_first_edition: bool, source: str
) -> DomainStatistics:
    tensors = {k.removeprefix("statistics."): v for k, v in router.items() if k.startswith("statistics.")}
    try:
        statistics = DomainStatistics.from_tensors(tensors)
        shapes = statistics.feature_sum.shape, statistics.feature_outer.shape, router["prototypes"].shape[1:]
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"The router tensors of {source} are incomplete.", cause=str(error)) from error
    if is_first_edition != (statistics.hashed is None):
        cause = f"{ROUTER_CONFIG} is of the {'first' if is_first_edition else 'second'} edition, the tensors are not"
        raise IntegrityError(f"The statistics of {source} do not fit its router.", cause=cause)
    if shapes != ((features,), (features, features), (features,)) or statistics.smallest_count < 0:
        cause = f"{ROUTER_CONFIG} says {features} features, the tensors have {shapes}; counts are not negative"
        raise IntegrityError(f"The statistics of {source} do not fit its router.", cause=cause)
    return statistics


def _router_tensors(pack: DomainPack) -> dict[str, Tensor]:
    tensors = {f"statistics.{name}": tensor for name, tensor in pack.statistics.tensors().items()}
    tensors["prototypes"] = pack.prototypes
    for index, layer in pack.bank.layers.items():
        tensors[f"layers.{index}.expert_gate"] = layer.expert_gate
        if layer.rank_gate is not None:
            tensors[f"layers.{index}.rank_gate"] = layer.rank_gate
        if layer.mean_gate is not None:
            tensors[f"layers.{index}.mean_gate"] = layer.mean_gate
    return tensors


def _tensors_of(bank: ExpertBank, expert: Expert) -> dict[tuple[int, str, str], Tensor]:
    """Return the expert's A and B matrices by layer, target and letter."""
    return {
        (index, target, letter): matrices[target]
        for index, layer in bank.select_expert(expert).layers.items()
        for letter, matrices in (("A", layer.A), ("B", layer.B))
        for target in matrices
    }


def _expert_tensors(bank: ExpertBank, expert: Expert, layout: ModelLayout) -> dict[str, Tensor]:
    return {
        tensor_key(layout.layers, index, target, letter): tensor
        for (index, target, letter), tensor in _tensors_of(bank, expert).items()
    }


def merged_tensors(bank: ExpertBank, layout: ModelLayout) -> dict[str, Tensor]:
    """Return the PEFT tensors of the bank with constant gates; scales and gates are folded into B."""
    tensors = {}
    for index, layer in bank.layers.items():
        factor = layer.scales() * layer.static_gate()
        for target in layer.A:
            tensors[tensor_key(layout.layers, index, target, "A")] = layer.A[target]
            tensors[tensor_key(layout.layers, index, target, "B")] = layer.B[target] * factor
    return tensors


def _add_expert(bank: ExpertBank, record: ExpertRecord, tensors: dict[str, Tensor], source: str) -> None:
    """Append one expert's tensors to the bank."""
    expert = Expert(
        id=record.id, rank=record.rank, alpha=record.alpha, method=record.method, generation=record.generation
    )
    layers: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        index, target, letter = parse_key(key, source=source)
        rank = tensor.shape[0 if letter == "A" else -1] if tensor.ndim == 2 else -1
        if rank != record.rank or not tensor.is_floating_point():
            cause = f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}, the manifest says rank {record.rank}"
            raise IntegrityError(f"Expert {record.id} of {source} does not fit its manifest.", cause=cause)
        layers.setdefault(index, {}).setdefault(target, {})[letter] = tensor
    if sorted(layers) != list(record.layers) or any(len(p) != 2 for t in layers.values() for p in t.values()):
        cause = f"the manifest says layers {list(record.layers)}, the file has {sorted(layers)}"
        raise IntegrityError(f"Expert {record.id} of {source} does not fit its manifest.", cause=cause)
    size = sum(tensor.numel() for tensor in tensors.values())
    if size != record.parameters:  # a target module more or less, or matrices of another width
        cause = f"the manifest says {record.parameters} parameters, the file has {size}"
        raise IntegrityError(f"Expert {record.id} of {source} does not fit its manifest.", cause=cause)
    for index, pairs in layers.items():
        _check_widths(bank.layers.get(index), pairs, where=f"Expert {record.id} of {source}, layer {index}")
        new = LayerExperts(
            experts=(expert,),
            A={target: pair["A"] for target, pair in pairs.items()},
            B={target: pair["B"] for target, pair in pairs.items()},
            expert_gate=torch.empty(0, 0),
            rank_gate=None,
        )
        bank.layers[index] = concat_layers(bank.layers[index], new) if index in bank.layers else new


def _check_widths(layer: LayerExperts | None, pairs: dict[str, dict[str, Tensor]], *, where: str) -> None:
    """Raise IntegrityError if an expert's matrices differ in width from those of the layer."""
    for target, pair in pairs.items():
        if layer is not None and target in layer.A:
            expected = layer.A[target].shape[1], layer.B[target].shape[0]
            found = pair["A"].shape[1], pair["B"].shape[0]
            if found != expected:
                cause = f"{target} is {found[0]} wide in and {found[1]} out, another expert's {expected}"
                raise IntegrityError(f"{where}, does not fit the others.", cause=cause)


def _add_gates(bank: ExpertBank, router: dict[str, Tensor], *, width: int, source: str) -> None:
    for index, layer in bank.layers.items():
        expert_gate = router.get(f"layers.{index}.expert_gate")
        layer.rank_gate = router.get(f"layers.{index}.rank_gate")
        layer.mean_gate = router.get(f"layers.{index}.mean_gate")
        has_experts = expert_gate is not None and expert_gate.shape == (len(layer.experts), width)
        has_ranks = layer.rank_gate is None or layer.rank_gate.shape == (layer.rank, width)
        has_mean = layer.mean_gate is None or layer.mean_gate.shape == (layer.rank,)
        gates = (expert_gate, layer.rank_gate, layer.mean_gate)
        are_real = all(gate is None or gate.is_floating_point() for gate in gates)
        if expert_gate is None or not (has_experts and has_ranks and has_mean and are_real):
            cause = f"layer {index} has {len(layer.experts)} experts on {layer.rank} ranks"
            raise IntegrityError(f"The gates of {source} do not fit its experts.", cause=cause)
        layer.expert_gate = expert_gate


def _load(files: PackSource, manifest: PackManifest, path: str) -> dict[str, Tensor]:
    return load_tensors(files.read(manifest, path), source=f"{manifest.name}@{manifest.version}: {path}")
