"""Packs of several generations of experts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorary.adapters.bank import extend_bank, new_bank
from lorary.adapters.config import BankConfig
from lorary.registry import Registry
from lorary.registry.pack.pack import expert_records, pack_files, read_pack


@pytest.fixture
def registry(cooking_store: Path, fresh_copy: Callable[[Path], Registry]) -> Registry:
    """KP and `cooking`, free to be altered."""
    return fresh_copy(cooking_store)


def test_a_second_generation_keeps_the_files_of_the_first_and_is_read_back(
    registry: Registry,
) -> None:
    manifest, base = registry.show("cooking"), registry.base
    pack = read_pack(registry.store, manifest)
    config = BankConfig(rank=3, experts=1.0, targets=("q_proj",))  # fewer targets than the first generation has
    generator = torch.Generator().manual_seed(0)
    addition = new_bank(base.model, base.layout, config, generator=generator, older=pack.bank.experts)
    both = replace(pack, bank=extend_bank(pack.bank, addition))

    files = pack_files(both, layout=base.layout, base_id=manifest.base.id, revision=None)
    stored = registry.store.commit(replace(manifest, experts=expert_records(both.bank)), files)

    kept = {file.path: file.sha256 for file in manifest.files if file.kind == "expert"}
    assert kept.items() <= {file.path: file.sha256 for file in stored.files}.items()
    found = read_pack(registry.store, stored).bank
    assert found.experts == both.bank.experts
    assert [e.generation for e in found.experts] == [0] * len(manifest.experts) + [1] * len(addition.experts)
    for (name, tensor), (_, expected) in zip(found.tensors(), both.bank.tensors(), strict=True):
        assert torch.equal(tensor, expected), name
