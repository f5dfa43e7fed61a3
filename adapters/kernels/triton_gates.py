"""Gates of a layer in two Triton kernels; plain torch launches fifteen.

    score   OUT[s, t, c] = sum over the s-th part of k of X[t, k] ROWS[c, k];   SQUARES[s, t] = the same of X[t, k]^2
    gate    G[t, r] = slot gate * softmax within the group * 2 sigmoid, from the sums of all parts

Score is a split-K product, so that even one token occupies the whole GPU; gate adds the partial sums in a fixed order.
For a 16-bit hidden state, scores reach float32 accuracy on tensor cores: each weight is the sum of two 16-bit numbers,
its rounded value and the rounding error.
"""

# Triton may be missing, and type checkers do not understand jitted functions.
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .gate_tables import EPSILON, GateTables
from .triton_launch import IS_INTERPRETED, choose_split_k, choose_tiles, jit, split_size

GATE_TOKENS, GATE_RANKS = 16, 64  # tile of the gate kernel


@jit
def score_kernel(
    x_ptr,
    rows_ptr,
    out_ptr,
    squares_ptr,
    tokens,
    width,
    scores,
    k_size,  # of each part, a multiple of BLOCK_K
    x_row,
    rows_row,
    out_part,
    TWO_TERMS: tl.constexpr,  # whether a weight is the sum of two numbers in the dtype of x
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute partial sums of X ROWS^T and of the squares of X; see above."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(2)
    in_rows, in_cols = rows < tokens, cols < scores
    long_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    first = part * k_size
    for start in range(first, tl.minimum(first + k_size, width), BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        in_ks = ks < width
        x = tl.load(x_ptr + long_rows[:, None] * x_row + ks[None, :], mask=in_rows[:, None] & in_ks[None, :], other=0.0)
        row = tl.load(
            rows_ptr + cols[None, :] * rows_row + ks[:, None], mask=in_cols[None, :] & in_ks[:, None], other=0.0
        )
        wide = x.to(tl.float32)
        if TWO_TERMS:
            high = row.to(x.dtype)
            total = tl.dot(x, high, total)
            total = tl.dot(x, (row - high.to(tl.float32)).to(x.dtype), total)
        else:
            total = tl.dot(wide, row, total, input_precision="ieee")
        squares += tl.sum(wide * wide, axis=1)
    out = out_ptr + part * out_part + long_rows[:, None] * scores + cols[None, :]
    tl.store(out, total, mask=in_rows[:, None] & in_cols[None, :])
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + part * tokens + rows, squares, mask=in_rows)


@jit
def gate_kernel(
    scores_ptr,
    squares_ptr,
    slot_gate_ptr,
    expert_ptr,  # expert of each rank
    slot_ptr,  # slot of each rank
    group_ptr,  # experts in the softmax group of each rank, padded with -1
    out_ptr,
    tokens,
    experts,
    ranks,
    scores_part,
    slot_gate_row,
    slot_gate_col,
    EPSILON: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # of the largest softmax group
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the product of slot, expert and rank gates; see above."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows, in_cols = rows < tokens, cols < ranks
    inside = in_rows[:, None] & in_cols[None, :]
    long_rows = rows.to(tl.int64)
    line = scores_ptr + long_rows[:, None] * (experts + ranks)
    expert = tl.load(expert_ptr + cols, mask=in_cols, other=0)
    slot = tl.load(slot_ptr + cols, mask=in_cols, other=0)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    of_expert = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    of_rank = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in tl.static_range(SPLIT_K):
        squares += tl.load(squares_ptr + part * tokens + rows, mask=in_rows, other=1.0)
        of_expert += tl.load(line + part * scores_part + expert[None, :], mask=inside, other=0.0)
        of_rank += tl.load(line + part * scores_part + experts + cols[None, :], mask=inside, other=0.0)
    length = tl.maximum(tl.sqrt(squares), EPSILON)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i in tl.static_range(GROUP_SIZE):
        member = tl.load(group_ptr + cols * GROUP_SIZE + i, mask=in_cols, other=0)
        is_member = inside & (member >= 0)[None, :]
        of_member = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for part in tl.static_range(SPLIT_K):
            of_member += tl.load(line + part * scores_part + member[None, :], mask=is_member, other=0.0)
        # scores are bounded, so the maximum need not be subtracted
        total += tl.where(is_member, tl.exp(of_member / length), 0.0)
    slot_gate = tl.load(
        slot_gate_ptr + long_rows[:, None] * slot_gate_row + slot[None, :] * slot_gate_col, mask=inside, other=0.0
    )
    total = tl.where(inside, total, 1.0)  # positive inside: every expert is a member of its own group
    found = slot_gate * tl.exp(of_expert / length) / total * (2 / (1 + tl.exp(-of_rank / length)))
    tl.store(out_ptr + long_rows[:, None] * ranks + cols[None, :], found, mask=inside)


def gates(
    hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
) -> Float[Tensor, "*tokens rank"]:
    """Compute the gates of a layer in two launches; see `Kernels`."""
    shape, ranks, experts = hidden.shape[:-1], len(tables.expert_of_rank), len(tables.slot_of_expert)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    by_token = slot_gate.expand(*shape, -1).reshape(-1, slot_gate.shape[-1])
    tokens, scores = len(flat), len(tables.rows)
    found = torch.empty(tokens, ranks, dtype=torch.float32, device=hidden.device)
    if not found.numel():
        return found.view(*shape, ranks)
    tiles = choose_tiles(tokens)
    row_blocks, blocks = triton.cdiv(tokens, tiles.score_m), triton.cdiv(scores, tiles.score_c)
    parts = choose_split_k(flat.shape[1], tiles.score_k, row_blocks * blocks)
    sums = torch.empty(parts, tokens, scores, dtype=torch.float32, device=hidden.device)
    squares = torch.empty(parts, tokens, dtype=torch.float32, device=hidden.device)
    score_kernel[(row_blocks, blocks, parts)](
        flat,
        tables.rows,
        sums,
        squares,
        tokens,
        flat.shape[1],
        scores,
        split_size(flat.shape[1], tiles.score_k, parts),
        flat.stride(0),
        tables.rows.stride(0),
        sums.stride(0),
        TWO_TERMS=needs_two_terms(flat.dtype),
        BLOCK_M=tiles.score_m,
        BLOCK_C=tiles.score_c,
        BLOCK_K=tiles.score_k,
        num_warps=tiles.score_warps,
    )
    gate_kernel[(triton.cdiv(tokens, GATE_TOKENS), triton.cdiv(ranks, GATE_RANKS))](
        sums,
        squares,
        by_token,
        tables.expert_of_rank,
        tables.slot_of_rank,
        tables.softmax_group_of_rank,
        found,
        tokens,
        experts,
        ranks,
        sums.stride(0),
        *by_token.stride(),
        EPSILON=EPSILON,
        SPLIT_K=parts,
        GROUP_SIZE=tables.softmax_group_of_rank.shape[1],
        BLOCK_M=GATE_TOKENS,
        BLOCK_R=GATE_RANKS,
        num_warps=4,
    )
    return found.view(*shape, ranks)


def needs_two_terms(dtype: torch.dtype) -> bool:
    """Return whether weights are split for a hidden state of `dtype`; the interpreter has no bfloat16 product."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not IS_INTERPRETED)
