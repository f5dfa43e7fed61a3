"""Reference implementation: the definition, module by module, unoptimized. Tests compare all others with it."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .gate_tables import EPSILON, GateTables
from .group import GroupGradients, GroupWeights, Linears


def gates(
    hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
) -> Float[Tensor, "*tokens rank"]:
    """Return slot gate * expert gate * rank gate; see `Kernels`. Differentiable by autograd."""
    all_scores = scores(hidden, tables.rows)
    return gated_ranks(all_scores, slot_gate, expert_gates(all_scores, tables.same_group), tables)


def scores(
    hidden: Float[Tensor, "*tokens width"], rows: Float[Tensor, "scores width"]
) -> Float[Tensor, "*tokens scores"]:
    """Return the scores of the normalized hidden state: those of the experts first, then those of the ranks."""
    hidden = hidden.float()
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp(min=EPSILON)
    return F.linear(hidden, rows) / length


def expert_gates(
    scores: Float[Tensor, "*tokens scores"], same_group: Float[Tensor, "experts experts"]
) -> Float[Tensor, "*tokens experts"]:
    """Return the softmax within each group; scores are bounded, so the maximum need not be subtracted."""
    exponentials = torch.exp(scores[..., : len(same_group)])
    return exponentials / F.linear(exponentials, same_group)


def rank_gates(scores: Float[Tensor, "*tokens scores"], experts: int) -> Float[Tensor, "*tokens rank"]:
    """Return 2 sigmoid(V h), with h scaled to a root mean square of 1."""
    return 2 * torch.sigmoid(scores[..., experts:])


def gated_ranks(
    scores: Float[Tensor, "*tokens scores"],
    slot_gate: Float[Tensor, "*#tokens slots"],
    experts: Float[Tensor, "*tokens experts"],
    tables: GateTables,
) -> Float[Tensor, "*tokens rank"]:
    """Return the product of the three gates of each rank."""
    by_expert = slot_gate.index_select(-1, tables.slot_of_expert) * experts
    ranks = rank_gates(scores, len(tables.slot_of_expert))
    return by_expert.index_select(-1, tables.expert_of_rank) * ranks


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
    """Compute y_m += B_m (g * (A_m x)); see `Kernels`. Sums are float32, rounded when stored."""
    lows = []
    for output, (A, Bt, gate) in zip(outputs, modules(weights, gates), strict=True):
        low = (x.float() @ A.float().T).to(x.dtype)
        gated = (low.float() * gate).to(x.dtype)
        output.copy_(output.float() + gated.float() @ Bt.float())
        lows.append(low)
    return torch.cat(lows, dim=1) if keep else None


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
    """Apply the chain rule module by module; see `Kernels`."""
    grad_x = torch.zeros_like(x, dtype=torch.float32) if needs_x_grad else None
    grad_gates = torch.zeros_like(gates) if needs_gates_grad else None
    grads_A, grads_Bt, start = [], [], 0
    whole = torch.arange(gates.shape[1], device=gates.device)
    for grad, (A, Bt, gate), new in zip(grad_outputs, modules(weights, gates), trainable, strict=True):
        part = slice(start, start + len(Bt))
        own = low[:, part].float()
        grad_gated = grad.float() @ Bt.float().T
        grad_low = (grad_gated * gate).to(x.dtype).float()
        if grad_gates is not None:
            columns = whole if weights.columns is None else weights.columns[part]
            grad_gates.index_add_(1, columns, grad_gated * own)
        if grad_x is not None:
            grad_x += grad_low @ A.float()
        tail = slice(len(Bt) - new, None)
        gated = (own * gate).to(x.dtype).float()
        grads_A.append(grad_low[:, tail].T @ x.float())
        grads_Bt.append(gated[:, tail].T @ grad.float())
        start += len(Bt)
    grad_x = None if grad_x is None else grad_x.to(x.dtype)
    return GroupGradients(x=grad_x, gates=grad_gates, A=tuple(grads_A), Bt=tuple(grads_Bt))


def modules(
    weights: GroupWeights, gates: Float[Tensor, "tokens rank"]
) -> Iterator[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ _"], Float[Tensor, "tokens _"]]]:
    """Yield A, Bt and gates of each module."""
    start = 0
    for Bt in weights.Bt:
        part = slice(start, start + len(Bt))
        gate = gates if weights.columns is None else gates[:, weights.columns[part]]
        yield weights.A[part], Bt, gate
        start += len(Bt)
