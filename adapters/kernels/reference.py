"""The definition, written as it is read: one module after another, no tricks. Every other path is compared with it."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .group import GroupGradients, GroupWeights


def update_(
    x: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> Float[Tensor, "tokens columns"] | None:
    """y_m += B_m (g * (A_m x)); see `Kernels`. Products are summed in float32 and rounded where they are stored."""
    lows = []
    for output, (A, Bt, gate) in zip(outputs, modules(weights, gates), strict=True):
        low = (x.float() @ A.float().T).to(x.dtype)
        gated = (low.float() * gate).to(x.dtype)
        output.copy_(output.float() + gated.float() @ Bt.float())
        lows.append(low)
    return torch.cat(lows, dim=1) if keep else None


def gradients_(
    grad_outputs: Sequence[Float[Tensor, "tokens _"]],
    x: Float[Tensor, "tokens d_in"],
    low: Float[Tensor, "tokens columns"],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    trainable: Sequence[int],
    grad_x: Float[Tensor, "tokens d_in"] | None,
    wants_gates: bool,
) -> GroupGradients:
    """The chain rule, one module after another; see `Kernels`."""
    grad_gates = torch.zeros_like(gates) if wants_gates else None
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
            grad_x.copy_(grad_x.float() + grad_low @ A.float())
        tail = slice(len(Bt) - new, None)
        gated = (own * gate).to(x.dtype).float()
        grads_A.append(grad_low[:, tail].T @ x.float())
        grads_Bt.append(gated[:, tail].T @ grad.float())
        start += len(Bt)
    return GroupGradients(gates=grad_gates, A=tuple(grads_A), Bt=tuple(grads_Bt))


def modules(
    weights: GroupWeights, gates: Float[Tensor, "tokens rank"]
) -> Iterator[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ _"], Float[Tensor, "tokens _"]]]:
    """Each module's A, Bt and gates."""
    start = 0
    for Bt in weights.Bt:
        part = slice(start, start + len(Bt))
        gate = gates if weights.columns is None else gates[:, weights.columns[part]]
        yield weights.A[part], Bt, gate
        start += len(Bt)
