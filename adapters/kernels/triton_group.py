"""Launches of the Triton kernels for a group, forward and backward.

Nothing synchronizes with the device or depends on values, so a whole forward pass can be captured in a CUDA graph.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Float
from torch import Tensor

from . import triton_gates
from .group import GroupGradients, GroupWeights, Linears
from .triton_kernels import expand_kernel, shrink_kernel
from .triton_launch import FEW_TOKENS, IS_INTERPRETED, NUM_SMS, Tiles, choose_split_k, choose_tiles, split_size

MAX_MODULES = 3  # in one launch of expand
gates = triton_gates.gates  # completes `Kernels`


def outputs(
    x: Float[Tensor, "tokens d_in"],
    linears: Linears,
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> tuple[list[Float[Tensor, "tokens _"]], Float[Tensor, "tokens columns"] | None]:
    """Run the base modules with the update, sharing passes over memory; see `Kernels`.

    For few tokens, one launch multiplies by the base weights and by A, and a second adds everything up. For many, the
    update is written first and the base product accumulates on it (beta = 1), which hides the read of the output.
    """
    Ws, biases = [weight for weight, _ in linears], [bias for _, bias in linears]
    if not len(x) or not len(weights.A):
        found = [F.linear(x, weight, bias) for weight, bias in linears]
        return found, x.new_zeros(len(x), len(weights.A)) if keep else None
    found = [x.new_empty(len(x), len(weight)) for weight in Ws]
    if len(x) <= FEW_TOKENS and not keep and all(weight.stride(1) == 1 for weight in Ws):
        tiles, wide = choose_tiles(len(x)), sum(map(len, Ws))
        blocks = sum(triton.cdiv(len(rows), tiles.shrink_c) for rows in (*Ws, weights.A))
        parts = choose_split_k(x.shape[1], tiles.shrink_k, blocks, target=4 * NUM_SMS)
        sums = torch.empty(parts, len(x), wide + len(weights.A), dtype=torch.float32, device=x.device)
        _shrink(x, weights.A, sums, gates, weights, tiles, base=Ws)
        _expand(sums, gates, found, weights.Bt, weights, tiles, biases=biases, has_base=True)
        return found, None
    low = _run_experts(x, found, gates, weights, keep=keep, accumulate=False, biases=biases)
    for output, weight in zip(found, Ws, strict=True):
        output.addmm_(x, weight.t())
    return found, low


def update_(
    x: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool = False,
) -> Float[Tensor, "tokens columns"] | None:
    """Add the gated updates in place; see `Kernels`."""
    if not len(x) or not len(weights.A):
        return x.new_zeros(len(x), len(weights.A)) if keep else None
    return _run_experts(x, outputs, gates, weights, keep=keep, accumulate=True)


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
    """Compute the backward pass with the same kernels; see `Kernels`.

    dY B is a shrink of dY, and dX = (g * dY B) A an expand into dX. The weight gradients of trainable ranks are
    products of two tall matrices, for which BLAS is fastest.
    """
    tiles = choose_tiles(len(x))
    grad_gated = torch.empty(1, *low.shape, dtype=torch.float32, device=x.device)
    start = 0
    for grad, Bt in zip(grad_outputs, weights.Bt, strict=True):
        if len(Bt) and len(x):
            _shrink(grad, Bt, grad_gated[:, :, start : start + len(Bt)], None, weights, tiles)
        start += len(Bt)
    grad_x = None
    if needs_x_grad:
        grad_x = torch.empty_like(x) if low.numel() else torch.zeros_like(x)
        if low.numel():
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
    if needs_gates_grad:
        product = grad_gated[0] * low
        if weights.columns is None:
            grad_gates = product.view(len(x), len(weights.Bt), gates.shape[1]).sum(1)
        else:
            grad_gates = torch.zeros_like(gates).index_add_(1, weights.columns, product)
    return GroupGradients(x=grad_x, gates=grad_gates, A=tuple(grads_A), Bt=tuple(grads_Bt))


def _run_experts(
    x: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: Float[Tensor, "tokens rank"],
    weights: GroupWeights,
    *,
    keep: bool,
    accumulate: bool,
    biases: Sequence[Tensor | None] = (),
) -> Float[Tensor, "tokens columns"] | None:
    """Add the gated updates to the outputs, or write them there; return `low` if `keep`."""
    tiles, columns = choose_tiles(len(x)), len(weights.A)
    if keep:
        low = x.new_empty(1, len(x), columns)
        _shrink(x, weights.A, low, None, weights, tiles)
    else:
        programs = triton.cdiv(len(x), tiles.shrink_m) * triton.cdiv(columns, tiles.shrink_c)
        parts = choose_split_k(x.shape[1], tiles.shrink_k, programs)
        low = torch.empty(parts, len(x), columns, dtype=torch.float32, device=x.device)
        _shrink(x, weights.A, low, gates, weights, tiles)
    _expand(low, gates, outputs, weights.Bt, weights, tiles, biases=biases, accumulate=accumulate)
    return low[0] if keep else None


def _shrink(
    x: Float[Tensor, "tokens width"],
    A: Float[Tensor, "columns width"],
    out: Float[Tensor, "parts tokens sums"],
    gates: Float[Tensor, "tokens rank"] | None,
    weights: GroupWeights,
    tiles: Tiles,
    *,
    base: Sequence[Float[Tensor, "_ width"]] = (),
) -> None:
    """Compute partial sums of X W^T of base modules, then of X A^T; with gates, tiles of A whose gates are 0 are 0."""
    parts, tokens, _ = out.shape
    Ws = [*base, *[A] * (MAX_MODULES - len(base))]
    features = [len(W) for W in base] + [0] * (MAX_MODULES - len(base))
    blocks = sum(triton.cdiv(size, tiles.shrink_c) for size in (*features, len(A)))
    shrink_kernel[(triton.cdiv(tokens, tiles.shrink_m), blocks, parts)](
        x,
        A,
        *Ws,
        out,
        out if gates is None else gates,
        out if weights.columns is None else weights.columns,
        tokens,
        x.shape[1],
        len(A),
        *features,
        split_size(x.shape[1], tiles.shrink_k, parts),
        *x.stride(),
        A.stride(0),
        *[W.stride(0) for W in Ws],
        out.stride(0),
        out.stride(1),
        0 if gates is None else gates.stride(0),
        RANK=1 if gates is None else gates.shape[1],
        HAS_COLUMNS=gates is not None and weights.columns is not None,
        SKIP_ZEROS=gates is not None,
        UPCAST=IS_INTERPRETED,
        BLOCK_M=tiles.shrink_m,
        BLOCK_C=tiles.shrink_c,
        BLOCK_K=tiles.shrink_k,
        num_warps=tiles.shrink_warps,
    )


def _expand(
    low: Float[Tensor, "parts tokens sums"],
    gates: Float[Tensor, "tokens rank"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    Bt: Sequence[Float[Tensor, "_ _"]],
    weights: GroupWeights,
    tiles: Tiles,
    *,
    biases: Sequence[Tensor | None] = (),
    accumulate: bool = False,
    has_base: bool = False,
) -> None:
    """Add (g * LOW) B to the outputs, or write it there, with biases and the base product's partial sums if present."""
    if len(outputs) > MAX_MODULES:
        raise ValueError(f"a group can have at most {MAX_MODULES} modules, found {len(outputs)}")
    missing = MAX_MODULES - len(outputs)
    ys, bs = [*outputs, *[outputs[0]] * missing], [*Bt, *[Bt[0]] * missing]
    has_bias = any(bias is not None for bias in biases)
    cs = ys  # placeholders, not read
    if has_bias:
        cs = [y.new_zeros(y.shape[1]) if bias is None else bias for y, bias in zip(outputs, biases, strict=True)]
        cs += cs[:1] * missing
    features = [output.shape[1] for output in outputs] + [0] * missing
    ranks = [len(rows) for rows in Bt] + [0] * missing
    blocks = sum(triton.cdiv(size, tiles.expand_n) for size in features)
    expand_kernel[(triton.cdiv(len(gates), tiles.expand_m), blocks)](
        low,
        gates,
        low if weights.columns is None else weights.columns,
        *ys,
        *bs,
        *cs,
        len(gates),
        *features,
        *ranks,
        *[y.stride(0) for y in ys],
        *[b.stride(0) for b in bs],
        low.stride(0),
        low.stride(1),
        gates.stride(0),
        SPLIT_K=low.shape[0],
        RANK=gates.shape[1],
        HAS_COLUMNS=weights.columns is not None,
        ACCUMULATE=accumulate,
        HAS_BIAS=has_bias,
        HAS_BASE=has_base,
        UPCAST=IS_INTERPRETED,
        BLOCK_M=tiles.expand_m,
        BLOCK_N=tiles.expand_n,
        BLOCK_R=tiles.expand_r,
        num_warps=tiles.expand_warps,
    )
