"""Packs as files: what is written is read back exactly, and nothing that was altered is loaded silently.

In the tests of altered packs the digests of the manifest are recomputed: whoever alters a pack can do that too.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lorary.domains.errors import IncompatibleError, IntegrityError
from lorary.registry import Registry
from lorary.registry.learn.proof import digest_of_tensors
from lorary.registry.pack.pack import ROUTER_CONFIG, ROUTER_TENSORS, expert_records, pack_files, read_pack
from lorary.registry.store.strict_json import canonical_json, parse_json

EXPERT = "experts/e1/adapter_model.safetensors"
KEY = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
KEY_B = KEY.replace("lora_A", "lora_B")

Tensors = dict[str, Tensor]


@pytest.fixture
def registry(cooking_store: Path, fresh_copy: Callable[[Path], Registry]) -> Registry:
    """KP and `cooking`, free to be altered."""
    return fresh_copy(cooking_store)


# --- round trip ---


@pytest.mark.parametrize("name", ["general", "cooking", "sailing"])
def test_a_pack_that_is_read_and_written_again_has_the_same_files(name: str, whole: Registry) -> None:
    manifest = whole.show(name)
    pack = read_pack(whole.store, manifest)

    files = pack_files(pack, layout=whole.base.layout, base_id=manifest.base.id, revision=None)

    assert {path: (kind, data) for path, (data, kind) in files.items()} == {
        file.path: (file.kind, whole.store.read(manifest, file.path)) for file in manifest.files
    }
    assert expert_records(pack.bank) == manifest.experts


def test_experts_come_back_on_one_rank_axis_in_order(whole: Registry) -> None:
    bank = read_pack(whole.store, whole.show("cooking")).bank

    assert bank.counts(4) == (0, 1, 2, 3)
    assert [expert.id for expert in bank.layers[3].experts] == ["e0", "e1", "e2"]
    assert bank.layers[3].A["mlp.up_proj"].shape == (6, 32)
    assert bank.layers[3].B["mlp.up_proj"].shape == (48, 6)


def test_the_manifest_counts_the_parameters_of_the_files(whole: Registry) -> None:
    manifest = whole.show("cooking")

    for record in manifest.experts:
        tensors = load(whole.store.read(manifest, f"experts/{record.id}/adapter_model.safetensors"))
        assert record.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_prototypes_are_unit_vectors(whole: Registry) -> None:
    prototypes = read_pack(whole.store, whole.show("sailing")).prototypes

    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(len(prototypes)))


def test_equal_packs_have_equal_bytes_whatever_the_order_of_their_tensors(whole: Registry) -> None:
    pack = read_pack(whole.store, whole.show("cooking"))
    for layer in pack.bank.layers.values():
        layer.A, layer.B = dict(reversed(layer.A.items())), dict(reversed(layer.B.items()))

    again = pack_files(pack, layout=whole.base.layout, base_id=whole.base_record.id, revision=None)

    manifest = whole.show("cooking")
    assert {path: data for path, (data, _) in again.items()} == {
        file.path: whole.store.read(manifest, file.path) for file in manifest.files
    }


# --- alterations of an expert ---


def nan_in(tensors: Tensors) -> Tensors:
    tensors[KEY][0, 0] = float("nan")
    return tensors


def infinity_in(tensors: Tensors) -> Tensors:
    tensors[KEY_B][0, 0] = float("-inf")
    return tensors


def wrong_rank(tensors: Tensors) -> Tensors:
    return tensors | {KEY: torch.zeros(3, 32)}


def rank_of_all_wrong(tensors: Tensors) -> Tensors:
    return {k: torch.cat([v, v], dim=0 if "lora_A" in k else 1) for k, v in tensors.items()}


def flat_tensor(tensors: Tensors) -> Tensors:
    return tensors | {KEY: tensors[KEY].flatten()}


def other_width(tensors: Tensors) -> Tensors:
    return tensors | {KEY: torch.zeros(2, 33)}


def half_of_a_pair(tensors: Tensors) -> Tensors:
    del tensors[KEY]
    return tensors


def one_target_less(tensors: Tensors) -> Tensors:
    del tensors[KEY], tensors[KEY_B]
    return tensors


def one_layer_less(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}


def nothing(_tensors: Tensors) -> Tensors:
    return {}


def extra_tensor(tensors: Tensors) -> Tensors:
    return tensors | {"bias": torch.zeros(3)}


def extra_layer(tensors: Tensors) -> Tensors:
    return tensors | {k.replace("s.2.", "s.1."): v.clone() for k, v in tensors.items() if "s.2." in k}


def extra_target(tensors: Tensors) -> Tensors:
    return tensors | {name.replace("q_proj", "x_proj"): tensors[name].clone() for name in (KEY, KEY_B)}


def extra_path(tensors: Tensors) -> Tensors:
    return tensors | {name.replace("model.layers", "vision.layers"): tensors[name].clone() for name in (KEY, KEY_B)}


ALTERATIONS = [
    nan_in,
    infinity_in,
    wrong_rank,
    rank_of_all_wrong,
    flat_tensor,
    other_width,
    half_of_a_pair,
    one_target_less,
    one_layer_less,
    nothing,
    extra_tensor,
    extra_layer,
    extra_target,
    extra_path,
]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_an_altered_expert_is_refused(alter: Callable[[Tensors], Tensors], registry: Registry, rewrite: Any) -> None:
    rewrite(registry.store, "cooking", EXPERT, lambda data: save(alter(load(data))))

    with pytest.raises(IntegrityError) as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 5


@pytest.mark.parametrize("path", [EXPERT, ROUTER_TENSORS])
@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(path: str, kept: int, registry: Registry, rewrite: Any) -> None:
    rewrite(registry.store, "cooking", path, lambda data: data[:kept])

    with pytest.raises(IntegrityError, match="cannot be read") as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 5


def test_a_file_without_recomputed_digest_is_refused(registry: Registry) -> None:
    file = registry.show("cooking").file(EXPERT)
    path = registry.store.blobs.path(file.sha256)
    path.chmod(0o644)
    path.write_bytes(save(nan_in(load(path.read_bytes()))))

    with pytest.raises(IntegrityError, match="damaged"):
        registry.compose("cooking")


def test_a_rank_of_the_manifest_that_the_file_does_not_have_is_refused(registry: Registry, rewrite: Any) -> None:
    manifest = registry.show("cooking")
    experts = tuple(replace(expert, rank=4) for expert in manifest.experts)
    rewrite(registry.store, "cooking", EXPERT, lambda data: data, experts=experts)

    with pytest.raises(IntegrityError, match="does not fit"):
        registry.compose("cooking")


def test_a_missing_expert_of_the_manifest_is_refused(registry: Registry, rewrite: Any) -> None:
    manifest = registry.show("cooking")
    rewrite(registry.store, "cooking", EXPERT, lambda data: data, experts=manifest.experts[:1])

    with pytest.raises(IntegrityError):
        registry.compose("cooking")


# --- alterations of the router's files ---


def gate_nan(tensors: Tensors) -> Tensors:
    tensors["layers.2.expert_gate"][0, 0] = float("nan")
    return tensors


def rank_gate_nan(tensors: Tensors) -> Tensors:
    tensors["layers.3.rank_gate"][0, 0] = float("inf")
    return tensors


def statistics_nan(tensors: Tensors) -> Tensors:
    tensors["statistics.feature_sum"][0] = float("nan")
    return tensors


def prototypes_nan(tensors: Tensors) -> Tensors:
    tensors["prototypes"][0, 0] = float("nan")
    return tensors


def gate_too_short(tensors: Tensors) -> Tensors:
    return tensors | {"layers.3.expert_gate": tensors["layers.3.expert_gate"][:-1]}


def gate_flat(tensors: Tensors) -> Tensors:
    return tensors | {"layers.3.expert_gate": tensors["layers.3.expert_gate"][:, 0]}


def gate_narrow(tensors: Tensors) -> Tensors:
    return tensors | {"layers.3.expert_gate": tensors["layers.3.expert_gate"][:, :-1]}


def rank_gate_narrow(tensors: Tensors) -> Tensors:
    return tensors | {"layers.3.rank_gate": tensors["layers.3.rank_gate"][:, :-1]}


def without_gate(tensors: Tensors) -> Tensors:
    del tensors["layers.2.expert_gate"]
    return tensors


def without_statistics(tensors: Tensors) -> Tensors:
    del tensors["statistics.feature_triangle"]
    return tensors


def without_prototypes(tensors: Tensors) -> Tensors:
    del tensors["prototypes"]
    return tensors


def token_beyond_the_vocabulary(tensors: Tensors) -> Tensors:
    tensors["statistics.token_ids"][-1] = 10**6
    return tensors


def negative_count(tensors: Tensors) -> Tensors:
    tensors["statistics.token_counts"][0] = -5
    return tensors


def smaller_vocabulary(tensors: Tensors) -> Tensors:
    return tensors | {"statistics.vocabulary": tensors["statistics.vocabulary"] // 2}


def larger_vocabulary(tensors: Tensors) -> Tensors:
    return tensors | {"statistics.vocabulary": tensors["statistics.vocabulary"] + 1}


def fewer_features(tensors: Tensors) -> Tensors:
    return tensors | {
        "statistics.feature_sum": tensors["statistics.feature_sum"][:-1],
        "statistics.feature_triangle": tensors["statistics.feature_triangle"][: 31 * 32 // 2],
    }


ROUTER_ALTERATIONS = [
    gate_nan,
    rank_gate_nan,
    statistics_nan,
    prototypes_nan,
    gate_too_short,
    gate_flat,
    gate_narrow,
    rank_gate_narrow,
    without_gate,
    without_statistics,
    without_prototypes,
    token_beyond_the_vocabulary,
    negative_count,
    smaller_vocabulary,
    larger_vocabulary,
    fewer_features,
]


@pytest.mark.parametrize("alter", ROUTER_ALTERATIONS, ids=lambda alter: alter.__name__)
def test_altered_router_tensors_are_refused(
    alter: Callable[[Tensors], Tensors], registry: Registry, rewrite: Any
) -> None:
    def change(data: bytes) -> bytes:
        return save({name: tensor.contiguous() for name, tensor in alter(load(data)).items()})

    rewrite(registry.store, "cooking", ROUTER_TENSORS, change)

    with pytest.raises(IntegrityError) as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "change",
    [
        {"tempers": {"token": 0.3}, "feature_layer": None},
        {"tempers": None},
        {"tempers": {"token": "0.3", "hidden": 0.1}},
        {"tempers": {"token": 0.3, "hidden": 0.1, "third": 1.0}},
        {"tempers": {"token": -1.0, "hidden": 0.1}},
        {"feature_layer": "one"},
        {"feature_layer": 3},
    ],
    ids=str,
)
def test_an_altered_router_config_is_refused(change: dict[str, Any], registry: Registry, rewrite: Any) -> None:
    def alter(data: bytes) -> bytes:
        return canonical_json(parse_json(data, source="test") | change)

    rewrite(registry.store, "cooking", ROUTER_CONFIG, alter)

    with pytest.raises(IntegrityError) as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "change",
    [{"schema": "lorary.router/3"}, {"projection": "sha256:0"}, {"expert_gate_temperature": 0.2}],
    ids=lambda change: next(iter(change)),
)
def test_a_router_made_in_another_way_is_refused(change: dict[str, Any], registry: Registry, rewrite: Any) -> None:
    def alter(data: bytes) -> bytes:
        return canonical_json(parse_json(data, source="test") | change)

    rewrite(registry.store, "cooking", ROUTER_CONFIG, alter)

    with pytest.raises(IncompatibleError) as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 6
    assert str(next(iter(change.values()))) in str(caught.value.cause)


def test_an_unchanged_file_with_a_rewritten_manifest_still_composes(registry: Registry, rewrite: Any) -> None:
    before = digest_of_tensors(read_pack(registry.store, registry.show("cooking")).bank.tensors())

    rewrite(registry.store, "cooking", EXPERT, lambda data: save(load(data)))

    assert registry.compose("cooking")
    after = digest_of_tensors(read_pack(registry.store, registry.show("cooking")).bank.tensors())
    assert after == before
