"""Train a composed model's bank between two sets of digests, so that everything else is proved unchanged."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...adapters.bank import ExpertBank
from ...adapters.config import TrainingConfig
from ...adapters.layer.attach import trained_bank
from ...adapters.layer.gates import LayerGates
from ...adapters.layer.routing import routing_of
from ...adapters.training.train import discard_checkpoints, divergence_error, train_bank
from ...domains.data.blocks import Blocks
from ...domains.errors import IntegrityError
from ...domains.progress import OnProgress
from ..store.store import Store
from .proof import check_only_new_is_trainable, frozen_digests, prove

MEAN_GATE_BLOCKS = 16  # token blocks over which mean gates are taken


def train_frozen(
    composed: PreTrainedModel,
    blocks: Blocks,
    training: TrainingConfig,
    *,
    validation: Blocks | None = None,
    base: PreTrainedModel,
    store: Store,
    folder: Path,
    stage: str,
    on_progress: OnProgress,
) -> tuple[ExpertBank, dict[str, Any], dict[str, Any]]:
    """Train the new bank of a composed model; return it with the frozen proof and the figures of the training.

    Raises:
        IntegrityError: Something frozen was trainable or has changed, or the loss is not finite. The checkpoints are
            discarded then: they are of a run that was not what it must be.
    """
    before = frozen_digests(base, composed, store)
    check_only_new_is_trainable(composed)
    try:
        figures = train_bank(
            composed, blocks, training, run=folder, stage=stage, on_progress=on_progress, validation=validation
        )
        check_only_new_is_trainable(composed)
        proof = prove(before, frozen_digests(base, composed, store))
        _check_finite(composed, training)
    except IntegrityError:
        discard_checkpoints(folder)
        raise
    return with_mean_gates(composed, blocks), proof, figures


def _check_finite(composed: PreTrainedModel, training: TrainingConfig) -> None:
    bad = [name for name, tensor in trained_bank(composed).tensors() if not torch.isfinite(tensor).all()]
    if bad:
        rate = training.learning_rate or 0.01
        raise divergence_error(f"the new bank has values that are not finite, first in {bad[0]}", rate)


@torch.inference_mode()
def with_mean_gates(composed: PreTrainedModel, blocks: Blocks) -> ExpertBank:
    """Return the trained bank with each rank's mean of expert gate times rank gate on its own text, for static use."""
    routing = routing_of(composed)
    bank = trained_bank(composed)
    device = next(composed.parameters()).device
    ids = blocks.input_ids[:MEAN_GATE_BLOCKS].to(device)
    mask = blocks.attention_mask[:MEAN_GATE_BLOCKS].to(device)
    states = composed(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    slot = len(routing.stack.names) - 1
    only = torch.zeros(1, 1, slot + 1, device=device)
    only[..., slot] = 1.0
    weight = mask.unsqueeze(-1).float()
    for index, layer in bank.layers.items():
        gates: LayerGates = composed.get_submodule(f"{routing.layout.layers}.{index}.expert_gates")  # type: ignore[assignment]
        own = gates(states[index], only)[..., -layer.rank :]
        layer.mean_gate = ((own * weight).sum((0, 1)) / weight.sum()).float().cpu()
    return bank
