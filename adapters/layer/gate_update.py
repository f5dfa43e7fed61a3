"""GateUpdate: the gates of a layer as one autograd function that saves only its inputs.

With scores s, softmax p inside a group, slot gate q and v = sigmoid of a rank's score, the gates are g = 2 q p v. Given
dg and dp', the gradient of the balance loss with respect to p:

    ds[rank]   = dg * g * (1 - v)
    dp[expert] = q * (sum over its ranks of dg * 2 v) + dp'
    ds[expert] = p * (dp - sum over its softmax group of p dp)                            softmax
    dh         = (ds rows - (ds . s) h / |h|) / |h|                               s = rows h / |h|
    drows      = (ds / |h|)^T h                                                   for trainable rows only

Scores, softmax and sigmoid are recomputed in the backward pass, which costs one thin matrix product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.gate_tables import EPSILON, GateTables
from ..kernels.reference import expert_gates


class GateUpdate(torch.autograd.Function):
    """Gates of shape (*tokens, rank), and p of the trainable experts, of shape (*tokens, new); `new` may be 0."""

    @staticmethod
    def forward(ctx, module, hidden, slot_gate, new_experts, new_ranks):  # noqa: D102
        ctx.module, ctx.new = module, (0 if new_experts is None else len(new_experts))
        ctx.save_for_backward(hidden, slot_gate, new_experts, new_ranks)
        tables = module.tables(new_experts, new_ranks)
        parts = _Parts(hidden, slot_gate, tables)
        gates = parts.by_expert.index_select(1, tables.expert_of_rank).mul_(parts.ranks).mul_(2)
        shares = parts.experts[:, len(tables.slot_of_expert) - ctx.new :]
        return gates.view(*hidden.shape[:-1], -1), shares.reshape(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, slot_gate, new_experts, new_ranks = ctx.saved_tensors
        tables: GateTables = ctx.module.tables(new_experts, new_ranks)
        parts = _Parts(hidden, slot_gate, tables)
        count, new = len(tables.slot_of_expert), ctx.new
        grad = grads[0].reshape(len(parts.scores), -1)
        doubled = grad * parts.ranks * 2
        ranks = doubled * parts.by_expert.index_select(1, tables.expert_of_rank) * (1 - parts.ranks)
        by_expert = doubled @ (tables.expert_of_rank[:, None] == torch.arange(count, device=grad.device)).float()
        experts = by_expert * parts.slot_gate
        experts[:, count - new :] += grads[1].reshape(len(experts), -1)
        weighted = parts.experts * experts
        weighted -= parts.experts * F.linear(weighted, tables.same_group)
        scores = torch.cat([weighted, ranks], dim=1)
        along = torch.where(parts.length > EPSILON, (scores * parts.scores).sum(1, keepdim=True) / parts.length, 0)
        scores /= parts.length
        found: list[Any] = [None] * 4
        if ctx.needs_input_grad[1]:
            grad_hidden = (scores @ tables.rows).addcmul_(along / parts.length, parts.hidden, value=-1)
            found[0] = grad_hidden.to(hidden.dtype).view(hidden.shape)
        if ctx.needs_input_grad[2]:
            by_slot = parts.experts.new_zeros(len(experts), slot_gate.shape[-1])
            by_slot.index_add_(1, tables.slot_of_expert, by_expert * parts.experts)
            found[1] = by_slot.view(*hidden.shape[:-1], -1).sum_to_size(slot_gate.shape)
        if new:
            found[2] = scores[:, count - new : count].t() @ parts.hidden
        if new_ranks is not None:
            found[3] = scores[:, scores.shape[1] - len(new_ranks) :].t() @ parts.hidden
        return None, *found


class _Parts:
    """Intermediate values of the gates, with all positions on one axis."""

    def __init__(self, hidden: Tensor, slot_gate: Tensor, tables: GateTables):
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).float()
        self.length = torch.linalg.vector_norm(self.hidden, dim=1, keepdim=True).clamp_(min=EPSILON)
        self.scores = F.linear(self.hidden, tables.rows).div_(self.length)
        self.experts = expert_gates(self.scores, tables.same_group)
        self.ranks = self.scores[:, tables.sizes[0] :].sigmoid()  # half of the rank gate
        by_position = slot_gate.expand(*hidden.shape[:-1], -1).reshape(-1, slot_gate.shape[-1])
        self.slot_gate = by_position.index_select(1, tables.slot_of_expert)
        self.by_expert = self.slot_gate * self.experts
