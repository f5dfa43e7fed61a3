"""Differences between versions: norms without forming dW, statistics, scores, files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.bank import ExpertBank
from lorary.registry import Registry
from lorary.registry.maintenance.diff import compare_versions
from lorary.registry.pack.pack import read_pack


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, both_store: Path, texts: Any, short_run: Any) -> Registry:
    """KP, `cooking` in two versions, `sailing`."""
    found = Registry.open(shutil.copytree(both_store, tmp_path_factory.mktemp("diff") / "store"))
    found.retrain("cooking", data=[texts["sailing"]], training=short_run()["training"], tolerance=9.0)
    return found


def dense(bank: ExpertBank, index: int) -> dict[str, torch.Tensor]:
    """Each target module's update under constant gates, as one matrix."""
    layer = bank.layers[index]
    gate = layer.scales() * layer.static_gate()
    return {target: (layer.B[target] * gate).double() @ layer.A[target].double() for target in layer.A}


@pytest.mark.parametrize(("a", "b"), [("cooking@1", "cooking@2"), ("cooking@2", "cooking@1"), ("cooking", "sailing")])
def test_norms_match_the_dense_updates(a: str, b: str, registry: Registry) -> None:
    found = compare_versions(registry.store, registry.show(a), registry.show(b))

    banks = [read_pack(registry.store, registry.show(reference)).bank for reference in (a, b)]
    assert [layer.layer for layer in found.layers] == sorted(banks[0].layers)
    for layer in found.layers:
        old, new = (dense(bank, layer.layer) for bank in banks)
        norms = [sum(m.square().sum() for m in update.values()) ** 0.5 for update in (old, new)]
        change = sum((new[target] - old[target]).square().sum() for target in new) ** 0.5
        assert layer.norms == pytest.approx([float(norm) for norm in norms], rel=1e-4, abs=1e-5)
        assert layer.change == pytest.approx(float(change), rel=1e-4, abs=1e-5)
        assert layer.ranks == (banks[0].layers[layer.layer].rank, banks[1].layers[layer.layer].rank)


def test_an_extension_differs_only_by_its_new_experts(registry: Registry) -> None:
    found = compare_versions(registry.store, registry.show("cooking@1"), registry.show("cooking@2"))

    bank = read_pack(registry.store, registry.show("cooking@2")).bank
    for layer in found.layers:
        both, experts = bank.layers[layer.layer], layer.experts[0]
        total = 0.0
        for target in both.A:
            gate = both.scales() * both.static_gate()
            gate[: sum(e.rank for e in both.experts[:experts])] = 0
            total += float(((both.B[target] * gate).double() @ both.A[target].double()).square().sum())
        assert layer.change == pytest.approx(total**0.5, rel=1e-4, abs=1e-5)
    kept = {path for path, state in found.files.items() if state == "same"}
    assert "experts/e0/adapter_model.safetensors" in kept
    assert found.files["router/router.safetensors"] == "changed"
    assert found.files["experts/e3/adapter_model.safetensors"] == "added"
    assert found.statistics["tokens"][1] > found.statistics["tokens"][0]
    gate = registry.show("cooking@2").evaluation["gate"]
    assert found.scores["gate"] == (gate["parent"], gate["new"])
    assert found.scores["routed"][0] == registry.show("cooking@1").evaluation["routed"]


def test_a_version_does_not_differ_from_itself(registry: Registry) -> None:
    found = compare_versions(registry.store, registry.show("cooking"), registry.show("cooking"))

    assert all(layer.change < 1e-6 and layer.norms[0] == layer.norms[1] > 0 for layer in found.layers)
    assert set(found.files.values()) == {"same"}
    assert found.feature_cosine == 1.0
