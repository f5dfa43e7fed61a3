"""The fused layer on a GPU: launches of the Triton kernels for a group, forward and backward.

Nothing here waits for the device or depends on values, so a whole forward pass can be captured in a CUDA graph.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from .group import GroupGradients, GroupWeights
from .triton_kernels import expand_kernel, shrink_kernel

MOST_MODULES = 3  # that one launch of expand serves
PROCESSORS = 132  # of an H100 or H200: as many programs keep it busy
MOST_SHARES = 16
IS_INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter has no dot of bfloat16


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut into programs."""

    shrink_m: int = 64
    shrink_c: int = 64
    shrink_k: int = 64
    expand_m: int = 64
    expand_n: int = 128
    expand_r: int = 32
    shrink_warps: int = 4
    expand_warps: int = 8


def choose_tiles(tokens: int) -> Tiles:
    """Tiles for so many tokens: a dot has 16 rows at least, and few tokens need no more."""
    if tokens <= 16:
        return Tiles(shrink_m=16, shrink_c=32, shrink_k=128, expand_m=16, expand_warps=4)
    if tokens <= 256:
        return Tiles(shrink_m=32, shrink_c=32, shrink_k=128, expand_m=32, expand_warps=4)
    return Tiles()


def update_(
    x: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> Float[Tensor, "tokens columns"] | None:
    """Adds the gated updates in place; see `Kernels`."""
    columns = len(weights.A)
    if not len(x) or not columns:
        return x.new_zeros(len(x), columns) if keep else None
    tiles = choose_tiles(len(x))
    if keep:
        low = x.new_empty(1, len(x), columns)
        _shrink(x, weights.A, low, None, weights, tiles)
    else:
        low = torch.empty(_shares(x, columns, tiles), len(x), columns, dtype=torch.float32, device=x.device)
        _shrink(x, weights.A, low, gates, weights, tiles)
    _expand(low, gates, outputs, weights.Bt, weights, tiles)
    return low[0] if keep else None


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
    """The backward pass through the same kernels; see `Kernels`.

    dY B is a shrink of dY, and dX += (g * dY B) A an expand into dX. The weight gradients of trainable ranks are
    products of two long thin matrices, which the BLAS library does best.
    """
    tiles = choose_tiles(len(x))
    grad_gated = torch.empty(1, *low.shape, dtype=torch.float32, device=x.device)
    start = 0
    for grad, Bt in zip(grad_outputs, weights.Bt, strict=True):
        if len(Bt) and len(x):
            _shrink(grad, Bt, grad_gated[:, :, start : start + len(Bt)], None, weights, tiles)
        start += len(Bt)
    if grad_x is not None and low.numel():
        _expand(grad_gated, gates, [grad_x], [weights.A], weights, tiles)
    grads_A, grads_Bt, start = [], [], 0
    for grad, Bt, new in zip(grad_outputs, weights.Bt, trainable, strict=True):
        tail = slice(start + len(Bt) - new, start + len(Bt))
        own = gates[:, gates.shape[1] - new :] if weights.columns is None else gates[:, weights.columns[tail]]
        grad_low = (grad_gated[0][:, tail] * own).to(x.dtype)
        grads_A.append(grad_low.t() @ x)
        grads_Bt.append((low[:, tail] * own).to(x.dtype).t() @ grad)
        start += len(Bt)
    grad_gates = None
    if wants_gates:
        product = grad_gated[0] * low
        if weights.columns is None:
            grad_gates = product.view(len(x), len(weights.Bt), gates.shape[1]).sum(1)
        else:
            grad_gates = torch.zeros_like(gates).index_add_(1, weights.columns, product)
    return GroupGradients(gates=grad_gates, A=tuple(grads_A), Bt=tuple(grads_Bt))


def _shares(x: Tensor, columns: int, tiles: Tiles) -> int:
    """Into how many shares the k axis is cut, so that all processors have work."""
    programs = triton.cdiv(len(x), tiles.shrink_m) * triton.cdiv(columns, tiles.shrink_c)
    steps = triton.cdiv(x.shape[1], tiles.shrink_k)
    return max(1, min(MOST_SHARES, PROCESSORS // programs, steps // 2))


def _shrink(
    x: Float[Tensor, "tokens width"],
    A: Float[Tensor, "columns width"],
    out: Float[Tensor, "shares tokens columns"],
    gates: Float[Tensor, "tokens rank"] | None,
    weights: GroupWeights,
    tiles: Tiles,
) -> None:
    """OUT = X A^T in shares; with gates, tiles without an open gate become zero."""
    shares, tokens, columns = out.shape
    steps = triton.cdiv(triton.cdiv(x.shape[1], tiles.shrink_k), shares)
    grid = (triton.cdiv(tokens, tiles.shrink_m), triton.cdiv(columns, tiles.shrink_c), shares)
    shrink_kernel[grid](
        x,
        A,
        out,
        out if gates is None else gates,
        out if weights.columns is None else weights.columns,
        tokens,
        x.shape[1],
        columns,
        steps * tiles.shrink_k,
        *x.stride(),
        *A.stride(),
        out.stride(0),
        out.stride(1),
        0 if gates is None else gates.stride(0),
        GATES=1 if gates is None else gates.shape[1],
        COLUMNS=gates is not None and weights.columns is not None,
        SKIP=gates is not None,
        UPCAST=IS_INTERPRETED,
        BLOCK_M=tiles.shrink_m,
        BLOCK_C=tiles.shrink_c,
        BLOCK_K=tiles.shrink_k,
        num_warps=tiles.shrink_warps,
    )


def _expand(
    low: Float[Tensor, "shares tokens columns"],
    gates: Float[Tensor, "tokens rank"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    Bt: Sequence[Float[Tensor, "_ _"]],
    weights: GroupWeights,
    tiles: Tiles,
) -> None:
    """Adds (g * LOW) B to the outputs; one launch for three modules."""
    if len(outputs) > MOST_MODULES:
        raise ValueError(f"{len(outputs)} modules in one group, one launch serves {MOST_MODULES}")
    missing = MOST_MODULES - len(outputs)
    ys, bs = [*outputs, *[outputs[0]] * missing], [*Bt, *[Bt[0]] * missing]
    features = [output.shape[1] for output in outputs] + [0] * missing
    ranks = [len(rows) for rows in Bt] + [0] * missing
    blocks = sum(triton.cdiv(size, tiles.expand_n) for size in features)
    expand_kernel[(triton.cdiv(len(gates), tiles.expand_m), blocks)](
        low,
        gates,
        low if weights.columns is None else weights.columns,
        *ys,
        *bs,
        len(gates),
        *features,
        *ranks,
        *[y.stride(0) for y in ys],
        *[b.stride(0) for b in bs],
        low.stride(0),
        low.stride(1),
        gates.stride(0),
        SHARES=low.shape[0],
        GATES=gates.shape[1],
        COLUMNS=weights.columns is not None,
        UPCAST=IS_INTERPRETED,
        BLOCK_M=tiles.expand_m,
        BLOCK_N=tiles.expand_n,
        BLOCK_R=tiles.expand_r,
        num_warps=tiles.expand_warps,
    )
