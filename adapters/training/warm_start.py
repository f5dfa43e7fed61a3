"""First values of a new bank: from the nearest stored domain, or from the domain's own activations.

A close neighbour (by prototypes, found with FAISS) is copied whole, experts and gates. Otherwise only the rows that
score the experts are set: to the k-means centroids of the hidden states that enter each layer, so that each expert
starts out with a part of the text. A stays random and B zero: the new bank changes nothing before it is trained.
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from ...domains.data.blocks import Blocks
from ...domains.statistics.prototypes import cluster
from ..bank import ExpertBank

CLOSE = 0.94  # similarity from which a neighbour lends its experts: of two parts of one corpus at most (docs/log.md)
SAMPLED_BLOCKS = 16
TOKENS_PER_BLOCK = 32


@torch.inference_mode()
def activation_weights(model: PreTrainedModel, blocks: Blocks, *, first_layer: int) -> list[float]:
    """For the schedule `data`: how much each layer from `first_layer` on changes its input on this text.

    Mean over tokens of |h_out / |h_out| - h_in / |h_in||: a layer that turns its input more is given more experts.
    """
    states, kept = _hidden_states(model, blocks)
    # directions, because transformers gives the last of the hidden states after the final norm
    change = [
        (F.normalize(after[kept].float(), dim=-1) - F.normalize(before[kept].float(), dim=-1))
        .norm(dim=-1)
        .mean()
        .item()
        for before, after in itertools.pairwise(states)
    ]
    return [max(value, 1e-6) for value in change[first_layer:]]


@torch.inference_mode()
def seed_expert_gates(bank: ExpertBank, model: PreTrainedModel, blocks: Blocks) -> None:
    """Sets each layer's expert rows to centroids of the unit hidden states that enter the layer."""
    states, is_real = _hidden_states(model, blocks)
    stride = max(1, is_real.shape[1] // TOKENS_PER_BLOCK)
    kept = is_real[:, ::stride].cpu()
    for index, layer in bank.layers.items():
        points = F.normalize(states[index].float().cpu()[:, ::stride][kept], dim=-1)
        layer.expert_gate = centroids(points, len(layer.experts))


def _hidden_states(model: PreTrainedModel, blocks: Blocks) -> tuple[tuple[Tensor, ...], Bool[Tensor, "blocks block"]]:
    """What enters each decoder layer, and what leaves the last, for some blocks; and where they hold text."""
    device = next(model.parameters()).device
    ids = blocks.input_ids[:SAMPLED_BLOCKS].to(device)
    mask = blocks.attention_mask[:SAMPLED_BLOCKS].to(device)
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return found.hidden_states, mask.bool()


def centroids(points: Float[Tensor, "points width"], count: int) -> Float[Tensor, "count width"]:
    """k-means centroids, each relative to the mean of all points: the common part tells experts nothing."""
    if count == 1 or len(points) < 2 * count:
        return points[:count].clone() if len(points) >= count else torch.zeros(count, points.shape[1])
    mean = points.mean(0)
    return torch.from_numpy(cluster((points - mean).numpy(), count, spherical=False))


def can_copy_experts(lender: ExpertBank, bank: ExpertBank) -> bool:
    """Whether the lender's experts have exactly the shape of the new bank's."""
    return {name: t.shape for name, t in _lent(lender)} == {name: t.shape for name, t in _lent(bank)} and all(
        lender.layers[i].experts == layer.experts for i, layer in bank.layers.items()
    )


def copy_experts(lender: ExpertBank, bank: ExpertBank) -> None:
    """Copies the lender's experts and gates into the new bank."""
    source = dict(_lent(lender))
    for name, tensor in _lent(bank):
        tensor.copy_(source[name])


def _lent(bank: ExpertBank) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in bank.tensors() if not name.endswith("mean_gate")]
