"""Fast path in plain torch: one product with A for the group, gates on the low-rank activation, B accumulated in place.

This needs the fewest passes over memory on a CPU (measurements in docs/layer.md). Every product is one BLAS call, and
nothing synchronizes with a device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .gate_tables import EPSILON, GateTables
from .group import GroupGradients, GroupWeights, Linears


def gates(
    hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
) -> Float[Tensor, "*tokens rank"]:
    """Compute the gates of a layer, in place where possible; see `Kernels`."""
    hidden = hidden.float()
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_(min=EPSILON)
    if len(tables.pieces) == 1:
        scores = F.linear(hidden, tables.pieces[0]).div_(length)
    else:
        scores = torch.cat([F.linear(hidden, rows) for rows in tables.pieces], dim=-1).div_(length)
    by_expert, by_rank = scores.split(tables.sizes, dim=-1)
    exponentials = by_expert.exp()
    exponentials.div_(F.linear(exponentials, tables.half_group))  # twice the softmax, for the factor 2 of the rank gate
    exponentials.mul_(slot_gate.index_select(-1, tables.slot_of_expert))
    return exponentials.index_select(-1, tables.expert_of_rank).mul_(by_rank.sigmoid_())


def outputs(
    x: Float[Tensor, "tokens d_in"],
    linears: Linears,
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> tuple[list[Float[Tensor, "tokens _"]], Float[Tensor, "tokens columns"] | None]:
    """Run the base modules, then add the update; see `Kernels`."""
    found = [F.linear(x, weight, bias) for weight, bias in linears]
    return found, update_(x, found, gates, weights, keep=keep)


def update_(
    x: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> Float[Tensor, "tokens columns"] | None:
    """Add the gated updates in place; see `Kernels`."""
    low = torch.mm(x, weights.transposed)
    if len(outputs) == 1 and weights.columns is None and not keep:  # fewest calls, for decoding
        outputs[0].addmm_(low.mul_(gates), weights.Bt[0])
        return None
    gate = _by_column(gates, weights)
    lanes = _by_module(low, gate)
    gated = (lanes * gate).to(low.dtype) if keep else lanes.mul_(gate)
    for output, part, Bt in zip(outputs, _split(gated, weights), weights.Bt, strict=True):
        output.addmm_(part, Bt)
    return low if keep else None


def gradients(
    grad_outputs: Sequence[Float[Tensor, "tokens _"]],
    x: Float[Tensor, "tokens d_in"],
    low: Float[Tensor, "tokens columns"],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    trainable: Sequence[int],
    needs_x_grad: bool,
    needs_gates_grad: bool,
) -> GroupGradients:
    """Compute the backward pass; see `Kernels`. Frozen experts cost no weight gradient."""
    parts = [torch.mm(grad, Bt.t()) for grad, Bt in zip(grad_outputs, weights.Bt, strict=True)]
    grad_gated = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    gate = _by_column(gates, weights)
    grad_low = (_by_module(grad_gated, gate) * gate).to(x.dtype).view_as(low)
    grads_A, grads_Bt, start = [], [], 0
    for grad, Bt, new in zip(grad_outputs, weights.Bt, trainable, strict=True):
        tail = slice(start + len(Bt) - new, start + len(Bt))
        own = gates[:, gates.shape[1] - new :] if weights.columns is None else gates[:, weights.columns[tail]]
        gated = (low[:, tail] * own).to(x.dtype)
        # an empty product would still cost a call
        grads_A.append(grad_low[:, tail].t() @ x if new else x.new_zeros(0, x.shape[1]))
        grads_Bt.append(gated.t() @ grad if new else grad.new_zeros(0, grad.shape[1]))
        start += len(Bt)
    return GroupGradients(
        x=torch.mm(grad_low, weights.A) if needs_x_grad else None,
        gates=_gate_gradient(grad_gated, low, gates, weights) if needs_gates_grad else None,
        A=tuple(grads_A),
        Bt=tuple(grads_Bt),
    )


def _by_column(gates: Float[Tensor, "tokens rank"], weights: GroupWeights) -> Tensor:
    """Return the gates as (tokens, columns), or (tokens, 1, rank) if all modules have all ranks."""
    if weights.columns is not None:
        return gates.index_select(1, weights.columns)
    return gates if len(weights.Bt) == 1 else gates.unsqueeze(1)


def _by_module(low: Float[Tensor, "tokens columns"], gate: Tensor) -> Tensor:
    """Reshape `low` to broadcast with the gates of `_by_column`."""
    return low if gate.ndim == 2 else low.view(len(low), -1, gate.shape[2])


def _split(gated: Tensor, weights: GroupWeights) -> Sequence[Tensor]:
    """Split the columns by module."""
    if len(weights.Bt) == 1:
        return (gated,)
    return gated.unbind(1) if gated.ndim == 3 else gated.split(weights.ranks, dim=1)


def _gate_gradient(
    grad_gated: Float[Tensor, "tokens columns"],
    low: Float[Tensor, "tokens columns"],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
) -> Float[Tensor, "tokens rank"]:
    product = grad_gated.float() * low
    if weights.columns is not None:
        return torch.zeros_like(gates).index_add_(1, weights.columns, product)
    return product if len(weights.Bt) == 1 else product.view(len(product), -1, gates.shape[1]).sum(1)
