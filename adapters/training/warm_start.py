"""Warm start of a new bank: copied from the nearest stored domain, or initialized from the domain's activations.

If a stored domain is similar enough (cosine of prototypes), all its experts and gates are copied. Otherwise only the
expert gates are initialized, to the k-means centroids of the hidden states entering each layer, so that each expert
starts with its own part of the text. A stays random and B zero: before training the bank leaves the logits unchanged.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from ...domains.data.blocks import Blocks
from ...domains.statistics.prototypes import cluster
from ..bank import ExpertBank

MIN_SIMILARITY = 0.94  # cosine from which experts are copied; reached only within one corpus (docs/log.md)
SAMPLED_BLOCKS = 16
TOKENS_PER_BLOCK = 32


@torch.inference_mode()
def activation_weights(model: PreTrainedModel, blocks: Blocks, *, layers: Sequence[int]) -> list[float]:
    """Return the layer weights of schedule `data`: how much each of these layers rotates its input.

    The weight is the mean over tokens of |h_out / |h_out| - h_in / |h_in||; layers that rotate more get more experts.
    """
    states, is_real = _hidden_states(model, blocks)
    # only directions compare, because transformers returns the last hidden state after the final norm
    change = [
        (F.normalize(after[is_real].float(), dim=-1) - F.normalize(before[is_real].float(), dim=-1))
        .norm(dim=-1)
        .mean()
        .item()
        for before, after in itertools.pairwise(states)
    ]
    return [max(change[layer], 1e-6) for layer in layers]


@torch.inference_mode()
def seed_expert_gates(bank: ExpertBank, model: PreTrainedModel, blocks: Blocks) -> None:
    """Set each layer's expert gates to the centroids of the normalized hidden states that enter the layer."""
    states, is_real = _hidden_states(model, blocks)
    stride = max(1, is_real.shape[1] // TOKENS_PER_BLOCK)
    kept = is_real[:, ::stride].cpu()
    for index, layer in bank.layers.items():
        points = F.normalize(states[index].float().cpu()[:, ::stride][kept], dim=-1)
        layer.expert_gate = centroids(points, len(layer.experts))


def _hidden_states(model: PreTrainedModel, blocks: Blocks) -> tuple[tuple[Tensor, ...], Bool[Tensor, "blocks block"]]:
    """Return the hidden states of the first blocks (inputs of all layers, then the final one) and their mask."""
    device = next(model.parameters()).device
    ids = blocks.input_ids[:SAMPLED_BLOCKS].to(device)
    mask = blocks.attention_mask[:SAMPLED_BLOCKS].to(device)
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return outputs.hidden_states, mask.bool()


def centroids(points: Float[Tensor, "points width"], count: int) -> Float[Tensor, "count width"]:
    """Return k-means centroids minus the mean of all points, the part that does not distinguish experts."""
    if count == 1 or len(points) < 2 * count:
        return points[:count].clone() if len(points) >= count else torch.zeros(count, points.shape[1])
    mean = points.mean(0)
    return torch.from_numpy(cluster((points - mean).numpy(), count, spherical=False))


def can_copy_experts(source: ExpertBank, target: ExpertBank) -> bool:
    """Return whether the experts of both banks have the same shapes, scales and layers."""
    source_shapes, target_shapes = (
        {name: tensor.shape for name, tensor in _copied_tensors(bank)} for bank in (source, target)
    )
    return source_shapes == target_shapes and all(
        source.layers[i].experts == layer.experts for i, layer in target.layers.items()
    )


def copy_experts(source: ExpertBank, target: ExpertBank) -> None:
    """Copy the experts and gates of one bank into another, in place."""
    tensors = dict(_copied_tensors(source))
    for name, tensor in _copied_tensors(target):
        tensor.copy_(tensors[name])


def _copied_tensors(bank: ExpertBank) -> list[tuple[str, Tensor]]:
    """Return the named tensors without mean gates, which are measured after training."""
    return [(name, tensor) for name, tensor in bank.tensors() if not name.endswith("mean_gate")]
