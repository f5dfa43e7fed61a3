"""Checking a pack against the loaded base model: layers, modules, widths and vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.domains.errors import IntegrityError
from lorary.registry import Registry
from lorary.registry.base.load import check_fit
from lorary.registry.pack.pack import DomainPack, read_pack


@pytest.fixture
def pack(whole: Registry) -> DomainPack:
    """A fresh pack that a test can modify."""
    return read_pack(whole.store, whole.show("cooking"))


def deeper(pack: DomainPack) -> None:
    pack.bank.layers[4] = pack.bank.layers.pop(3)


def renamed(pack: DomainPack) -> None:
    for matrices in (pack.bank.layers[2].A, pack.bank.layers[2].B):
        matrices["mlp.other_proj"] = matrices.pop("mlp.up_proj")


def on_a_norm(pack: DomainPack) -> None:
    for matrices in (pack.bank.layers[2].A, pack.bank.layers[2].B):
        matrices["input_layernorm"] = matrices.pop("self_attn.o_proj")


def wider_in(pack: DomainPack) -> None:
    pack.bank.layers[2].A["mlp.up_proj"] = torch.zeros(4, 33)


def wider_out(pack: DomainPack) -> None:
    pack.bank.layers[2].B["mlp.up_proj"] = torch.zeros(47, 4)


def wider_gates(pack: DomainPack) -> None:
    pack.bank.layers[1].expert_gate = torch.zeros(1, 64)


def test_a_pack_made_for_the_base_fits(pack: DomainPack, whole: Registry) -> None:
    check_fit(pack, whole.base, source="cooking@1")


@pytest.mark.parametrize("change", [deeper, renamed, on_a_norm, wider_in, wider_out, wider_gates])
def test_experts_that_do_not_match_the_base_are_refused(
    change: Callable[[DomainPack], None], pack: DomainPack, whole: Registry
) -> None:
    change(pack)

    with pytest.raises(IntegrityError, match="cooking@1 does not fit") as caught:
        check_fit(pack, whole.base, source="cooking@1")

    assert "base" in str(caught.value.cause)


def test_a_feature_layer_beyond_the_last_layer_is_refused(pack: DomainPack, whole: Registry) -> None:
    with pytest.raises(IntegrityError):
        check_fit(replace(pack, feature_layer=4), whole.base, source="x")


def test_token_counts_of_another_vocabulary_size_are_refused(pack: DomainPack, whole: Registry) -> None:
    counts: Any = torch.cat([pack.statistics.token_counts, torch.ones(1, dtype=torch.int64)])

    with pytest.raises(IntegrityError):
        check_fit(replace(pack, statistics=replace(pack.statistics, token_counts=counts)), whole.base, source="x")
