"""Strict validation of untrusted packs.

A pack is accepted if it stays within all size limits, every value is in the range that training can produce, and
writing the parsed pack again gives the same files. So a pack contains nothing that this program would not have
written: no extra tensors or keys, no scale that differs from the manifest, and no whole-bank adapter that differs from
the sum of its experts.

Validation cannot tell how an expert behaves: see docs/threat-model.md.
"""

import re
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ...adapters.bank import LayerExperts
from ...domains.base_model import ModelLayout
from ...domains.statistics.hashed_rows import EIGENPAIRS, HashedRows
from ...domains.statistics.hashing import HASHED, MAX_FEATURES
from ...domains.statistics.statistics import FIRST_FEATURES, DomainStatistics
from ..store.manifest import ADAPTER_CONFIG, ROUTER_CONFIG, PackManifest
from ..store.strict_json import canonical_json, parse_json
from .check_manifest import check_manifest, unsound
from .pack import DomainPack, expert_records, pack_files, read_pack
from .pack_source import PackSource
from .tensor_file import load_tensors

MAX_UPDATE: Final = 1e4  # largest sum over ranks of scale |A_r| |B_r|: the norm of an expert's update of one module
MAX_GATE: Final = 1e4  # largest absolute value of a gate's weights
MAX_MEAN_GATE: Final = 2.001  # an expert gate is at most 1, a rank gate at most 2
MAX_TEMPERATURE: Final = 100.0
MAX_COUNT: Final = 1 << 53  # of tokens or rows; float64 counts exactly up to here
MAX_PROTOTYPES: Final = 1024
MAX_HASHED_TRACE: Final = 1e4  # largest mean square of a row of hashed features
HALF_ROUNDING: Final = 1e-2  # of sums of factors in float16
MAX_FEATURE: Final = 1e3  # largest mean square of a feature row, as a multiple of the width
UNIT: Final = 1e-3  # how far a prototype's length may be from 1
ROUNDING: Final = 1e-6  # relative rounding error of the sums in statistics

_MODULE_PATH: Final = re.compile(r"[A-Za-z_]\w{0,63}(\.\w{1,64}){0,8}", re.ASCII)


def check_pack(files: PackSource, manifest: PackManifest) -> DomainPack:
    """Read and validate an untrusted pack.

    Raises:
        IntegrityError: Its files do not match its manifest, or a value is invalid; the message names both.
        IncompatibleError: An incompatible version of this program made it.
    """
    check_manifest(manifest)
    pack = read_pack(files, manifest)
    try:
        _check_bank(pack, manifest)
        _check_router(pack, files, manifest)
        _check_same_files(pack, files, manifest)
    except ValueError as error:
        raise unsound(f"{manifest.name}@{manifest.version}", str(error)) from error
    return pack


def _check_bank(pack: DomainPack, manifest: PackManifest) -> None:
    told = tuple(replace(record, extra={}) for record in manifest.experts)
    for found, record in zip(expert_records(pack.bank), told, strict=True):
        _require(found == record, f"expert {record.id} is {found}, the manifest says {record}")
    counts = manifest.allocation["counts"]
    found_counts = [0] * len(counts)
    for index, layer in pack.bank.layers.items():
        _require(index < len(counts), f"there are experts in layer {index}, the manifest counts {len(counts)} layers")
        found_counts[index] = len(layer.experts)
        _check_layer(layer, where=f"layer {index}")
    _require(found_counts == counts, f"the experts of each layer are {found_counts}, the manifest says {counts}")


def _check_layer(layer: LayerExperts, *, where: str) -> None:
    for target in layer.A:
        lengths = _lengths(layer.A[target], 1) * _lengths(layer.B[target], 0) * layer.scales().abs().double()
        update = lengths.sum().item()
        _require(update <= MAX_UPDATE, f"{where}, {target}: an update of norm {update:.3g}; at most {MAX_UPDATE:g}")
    gates = {"expert_gate": layer.expert_gate, "rank_gate": layer.rank_gate, "mean_gate": layer.mean_gate}
    for name, gate in gates.items():
        if gate is None or not gate.numel():
            continue
        least, most = (0.0, MAX_MEAN_GATE) if name == "mean_gate" else (-MAX_GATE, MAX_GATE)
        low, high = gate.min().item(), gate.max().item()
        _require(gate.dtype == torch.float32, f"{where}, {name}: numbers of {gate.dtype}")
        _require(least <= low and high <= most, f"{where}, {name}: {low:.3g} to {high:.3g}, not {least:g} to {most:g}")


def _lengths(matrix: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=axis, dtype=torch.float64)


def _check_router(pack: DomainPack, files: PackSource, manifest: PackManifest) -> None:
    config = _json(files, manifest, ROUTER_CONFIG)
    width, features = config["feature_width"], config["features"]
    most = FIRST_FEATURES if pack.temperatures.is_first_edition else MAX_FEATURES
    _require(features == min(width, most), f"features cannot be {features} where the width is {width}")
    depth = len(manifest.allocation["counts"])
    _require(0 <= pack.feature_layer < depth, f"feature_layer cannot be {pack.feature_layer} of {depth} layers")
    temperatures = pack.temperatures.token, pack.temperatures.hidden, pack.temperatures.ridge
    _require(max(temperatures) <= MAX_TEMPERATURE, f"tempers cannot be {temperatures}")
    _check_prototypes(pack.prototypes, is_routed=manifest.is_routed)
    _check_statistics(pack.statistics, width=width)
    is_first = pack.statistics.hashed is None
    _require(is_first == pack.temperatures.is_first_edition, "moments of another edition than the router's")
    if pack.statistics.hashed is not None:
        _check_hashed(pack.statistics.hashed)


def _check_hashed(hashed: HashedRows) -> None:
    """Raise ValueError if no text can have these moments of hashed features."""
    rows, mean, factors = hashed.rows, hashed.mean, hashed.factors
    _require(0 <= rows <= MAX_COUNT and rows == int(rows), f"there cannot be {rows} hashed rows")
    _require(mean.dtype == torch.float32 and factors.dtype == torch.float16, f"factors of {factors.dtype}")
    _require(len(factors) <= min(EIGENPAIRS, HASHED), f"there are {len(factors)} factors")
    trace = factors.double().square().sum().item() + hashed.cut
    _require(hashed.cut >= 0 and trace <= MAX_HASHED_TRACE, f"a mean square of hashed features of {trace:.3g}")
    size = mean.double().square().sum().item()
    _require(size <= trace * (1 + HALF_ROUNDING) + HALF_ROUNDING, f"a mean of square {size:.3g}, above {trace:.3g}")


def _check_prototypes(prototypes: Tensor, *, is_routed: bool) -> None:
    _require(prototypes.dtype == torch.float32 and prototypes.ndim == 2, f"prototypes are of {prototypes.dtype}")
    least = 1 if is_routed else 0
    _require(least <= len(prototypes) <= MAX_PROTOTYPES, f"there are {len(prototypes)} prototypes")
    off = (_lengths(prototypes, 1) - 1).abs().max().item() if len(prototypes) else 0.0
    _require(off <= UNIT, f"a prototype's length is off 1 by {off:.3g}")


def _check_statistics(statistics: DomainStatistics, *, width: int) -> None:
    """Raise ValueError if no text can have these statistics: valid counts, and moments of bounded feature rows."""
    for counts in (statistics.token_counts, statistics.pair_counts):
        most, total = counts.max().item(), counts.double().sum().item()
        _require(counts.min().item() >= 0 and total <= MAX_COUNT, f"counts are up to {most}, together {total:.3g}")
    rows = statistics.rows
    _require(0 <= rows <= MAX_COUNT and rows == int(rows), f"there cannot be {rows} feature rows")
    mean, outer = statistics.feature_sum, statistics.feature_outer
    _require(mean.dtype == outer.dtype == torch.float64, f"feature sums are of {mean.dtype} and {outer.dtype}")
    trace = outer.diagonal().sum().item()
    bound = rows * width * MAX_FEATURE
    _require(outer.diagonal().min().item() >= 0 and trace <= bound, f"a mean square of features of {trace:.3g}")
    largest = max(outer.abs().max().item(), mean.abs().max().item() ** 2 / max(rows, 1.0))
    _require(largest <= trace * (1 + ROUNDING), f"feature sums of {largest:.3g} where the squares sum to {trace:.3g}")
    _require((outer - outer.T).abs().max().item() <= trace * ROUNDING, "second moments that are not symmetric")
    scatter = outer - torch.outer(mean, mean) / max(rows, 1.0)
    least = torch.linalg.eigvalsh(scatter).min().item()
    _require(least >= -trace * ROUNDING, f"a variance of features of {least:.3g}")


def _check_same_files(pack: DomainPack, files: PackSource, manifest: PackManifest) -> None:
    """Raise ValueError if writing the parsed pack again gives different files."""
    for path, (expected, _kind) in _written(pack, files, manifest).items():
        found = files.read(manifest, path)
        if found == expected:
            continue
        if path.endswith(".json"):
            _check_same_json(_json(files, manifest, path), parse_json(expected, source=path), path)
        else:
            source = f"{manifest.name}@{manifest.version}: {path}"
            _check_same_tensors(load_tensors(found, source=source), load_tensors(expected, source=path), path)


def _written(pack: DomainPack, files: PackSource, manifest: PackManifest) -> dict[str, tuple[bytes, str]]:
    adapter, router = _json(files, manifest, ADAPTER_CONFIG), _json(files, manifest, ROUTER_CONFIG)
    layers, transposed = str(router.get("decoder_layers")), adapter.get("fan_in_fan_out")
    _require(_MODULE_PATH.fullmatch(layers) and len(layers) <= 255, f"decoder_layers cannot be {layers[:80]!r}")
    _require(isinstance(transposed, bool), f"fan_in_fan_out cannot be {str(transposed)[:80]!r}")
    layout = ModelLayout(
        decoder=layers.rpartition(".")[0],
        layers=layers,
        count=len(manifest.allocation["counts"]),
        width=router["feature_width"],
        transposed=bool(transposed),
    )
    return pack_files(pack, layout=layout, base_id=manifest.base.id, revision=manifest.base.revision)


def _json(files: PackSource, manifest: PackManifest, path: str) -> dict[str, Any]:
    value = parse_json(files.read(manifest, path), source=f"{manifest.name}@{manifest.version}: {path}")
    _require(isinstance(value, dict), f"{path} is no object")
    return value


def _check_same_json(found: dict[str, Any], expected: dict[str, Any], path: str) -> None:
    """Compare by canonical bytes, because 1 == 1.0 == True in Python."""
    for key in sorted(found.keys() | expected.keys()):
        values = [canonical_json(value[key]) if key in value else b"missing" for value in (found, expected)]
        texts = [value.decode()[:120].strip() for value in values]
        _require(values[0] == values[1], f"{path} has {key[:80]!r} as {texts[0]}, the rest of the pack as {texts[1]}")


def _check_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: str) -> None:
    other = sorted(found.keys() ^ expected.keys())
    if other:
        where = "more than" if other[0] in found else "not"
        raise ValueError(f"{path} has a tensor {where} the rest of the pack says: {other[0]}")
    for name, tensor in found.items():
        wanted = expected[name]
        # experts of a narrower dtype are widened to that of the widest expert in the layer
        is_kind = tensor.dtype == wanted.dtype or (tensor.is_floating_point() and path.startswith("experts/"))
        is_same = tensor.shape == wanted.shape and torch.equal(tensor.to(wanted.dtype), wanted)
        _require(is_kind and is_same, f"{path} has another {name} than the rest of the pack says")


def _require(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
