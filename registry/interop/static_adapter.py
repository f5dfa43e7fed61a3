"""A static composition as one ordinary PEFT adapter: all its banks under constant gates, side by side on the rank axis.

    update = sum over slots s of prior_s sum over ranks of gate scale B[:, rank] A[rank, :]

Scales, gates and priors are folded into B, so alpha equals the rank. Slots with the share 0 are left out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...adapters.bank import Expert, ExpertBank, LayerExperts, concat_layers
from ...domains.base_model import ModelLayout
from ..pack.pack import DomainPack, merged_tensors
from ..pack.peft_config import bank_config
from ..pack.tensor_file import save_tensors
from ..store.manifest import ADAPTER_CONFIG, ADAPTER_TENSORS
from ..store.strict_json import canonical_json


def static_bank(packs: Sequence[DomainPack], shares: Sequence[float]) -> ExpertBank:
    """The banks of a static composition as one, whose gates are 1."""
    bank = ExpertBank()
    for pack, share in zip(packs, shares, strict=True):
        for index, layer in pack.bank.layers.items() if share else ():
            new = _under_constant_gates(layer, share)
            bank.layers[index] = concat_layers(bank.layers[index], new) if index in bank.layers else new
    return bank


def one_rank(bank: ExpertBank) -> ExpertBank:
    """The same with rows of zeros, so that every layer has the largest rank."""
    largest = max(layer.rank for layer in bank.layers.values())
    return ExpertBank({index: _padded(layer, largest - layer.rank) for index, layer in bank.layers.items()})


def adapter_files(bank: ExpertBank, layout: ModelLayout, *, base_id: str, revision: str | None) -> dict[str, bytes]:
    """The two files of an adapter of PEFT."""
    config = bank_config(bank, layout=layout, base_id=base_id, revision=revision)
    return {
        ADAPTER_CONFIG: canonical_json(config),
        ADAPTER_TENSORS: save_tensors(merged_tensors(bank, layout)),
    }


def _under_constant_gates(layer: LayerExperts, share: float) -> LayerExperts:
    factor = layer.scales() * layer.static_gate() * share
    return LayerExperts(
        experts=(Expert(id="all", rank=layer.rank, alpha=float(layer.rank)),),
        A=layer.A,
        B={target: B * factor for target, B in layer.B.items()},
        expert_gate=torch.zeros(1, layer.expert_gate.shape[1]),
        rank_gate=None,
        mean_gate=torch.ones(layer.rank),
    )


def _padded(layer: LayerExperts, rows: int) -> LayerExperts:
    rank = layer.rank + rows
    return LayerExperts(
        experts=(Expert(id="all", rank=rank, alpha=float(rank)),),
        A={target: F.pad(A, (0, 0, 0, rows)) for target, A in layer.A.items()},
        B={target: F.pad(B, (0, rows)) for target, B in layer.B.items()},
        expert_gate=layer.expert_gate[:1],
        rank_gate=None,
        mean_gate=torch.ones(rank),
    )
