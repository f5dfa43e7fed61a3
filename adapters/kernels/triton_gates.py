"""The gates of a layer on a GPU: two Triton kernels where plain torch launches fifteen.

    score   OUT[s, t, c] = sum over the s-th share of k of X[t, k] ROWS[c, k];   SQUARES[s, t] = the same of X[t, k]^2
    gate    G[t, r] = slot gate * softmax in its group * 2 sigmoid, from the shares' sums

Score cuts the long axis into shares, so that one token keeps a whole GPU busy; gate adds them up in a fixed order.
Where the hidden state has 16 bits, scores are as good as in float32 and still made by tensor cores: each row is split
into two numbers of its type, of which the second is what the first leaves out.
"""

# Triton is not always installed, and what it makes of a function is not what a type checker sees.
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .gate_tables import EPSILON, GateTables
from .triton_launch import IS_INTERPRETED, choose_tiles, count_shares, kernel, share_size

GATE_TOKENS, GATE_RANKS = 16, 64  # of one program of the second kernel


@kernel
def score_kernel(
    x_ptr,
    rows_ptr,
    out_ptr,
    squares_ptr,
    tokens,
    width,
    scores,
    share,  # of the k axis, a multiple of BLOCK_K
    x_row,
    rows_row,
    out_share,
    SPLIT: tl.constexpr,  # whether rows are split into two numbers of the type of x
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """X ROWS^T and squares of X, in shares; see above."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(2)
    in_rows, in_cols = rows < tokens, cols < scores
    long_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    first = part * share
    for start in range(first, tl.minimum(first + share, width), BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        in_ks = ks < width
        x = tl.load(x_ptr + long_rows[:, None] * x_row + ks[None, :], mask=in_rows[:, None] & in_ks[None, :], other=0.0)
        row = tl.load(
            rows_ptr + cols[None, :] * rows_row + ks[:, None], mask=in_cols[None, :] & in_ks[:, None], other=0.0
        )
        wide = x.to(tl.float32)
        if SPLIT:
            high = row.to(x.dtype)
            total = tl.dot(x, high, total)
            total = tl.dot(x, (row - high.to(tl.float32)).to(x.dtype), total)
        else:
            total = tl.dot(wide, row, total, input_precision="ieee")
        squares += tl.sum(wide * wide, axis=1)
    out = out_ptr + part * out_share + long_rows[:, None] * scores + cols[None, :]
    tl.store(out, total, mask=in_rows[:, None] & in_cols[None, :])
    if tl.program_id(1) == 0:
        tl.store(squares_ptr + part * tokens + rows, squares, mask=in_rows)


@kernel
def gate_kernel(
    scores_ptr,
    squares_ptr,
    slot_gate_ptr,
    expert_ptr,  # of each rank, and so on
    slot_ptr,
    mates_ptr,
    out_ptr,
    tokens,
    experts,
    ranks,
    scores_share,
    slot_gate_row,
    slot_gate_col,
    EPSILON: tl.constexpr,
    SHARES: tl.constexpr,
    MATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The product of slot, expert and rank gates; see above."""
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
    for part in tl.static_range(SHARES):
        squares += tl.load(squares_ptr + part * tokens + rows, mask=in_rows, other=1.0)
        of_expert += tl.load(line + part * scores_share + expert[None, :], mask=inside, other=0.0)
        of_rank += tl.load(line + part * scores_share + experts + cols[None, :], mask=inside, other=0.0)
    length = tl.maximum(tl.sqrt(squares), EPSILON)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for place in tl.static_range(MATES):
        mate = tl.load(mates_ptr + cols * MATES + place, mask=in_cols, other=0)
        known = inside & (mate >= 0)[None, :]
        of_mate = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for part in tl.static_range(SHARES):
            of_mate += tl.load(line + part * scores_share + mate[None, :], mask=known, other=0.0)
        # scores of experts are bounded: no maximum needs to be taken out
        total += tl.where(known, tl.exp(of_mate / length), 0.0)
    slot_gate = tl.load(
        slot_gate_ptr + long_rows[:, None] * slot_gate_row + slot[None, :] * slot_gate_col, mask=inside, other=0.0
    )
    total = tl.where(inside, total, 1.0)  # every expert is its own mate, so it is 0 nowhere else
    found = slot_gate * tl.exp(of_expert / length) / total * (2 / (1 + tl.exp(-of_rank / length)))
    tl.store(out_ptr + long_rows[:, None] * ranks + cols[None, :], found, mask=inside)


def gates(
    hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
) -> Float[Tensor, "*tokens rank"]:
    """The gates of a layer in two launches; see `Kernels`."""
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
    shares = count_shares(flat.shape[1], tiles.score_k, row_blocks * blocks)
    sums = torch.empty(shares, tokens, scores, dtype=torch.float32, device=hidden.device)
    squares = torch.empty(shares, tokens, dtype=torch.float32, device=hidden.device)
    score_kernel[(row_blocks, blocks, shares)](
        flat,
        tables.rows,
        sums,
        squares,
        tokens,
        flat.shape[1],
        scores,
        share_size(flat.shape[1], tiles.score_k, shares),
        flat.stride(0),
        tables.rows.stride(0),
        sums.stride(0),
        SPLIT=splits(flat.dtype),
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
        SHARES=shares,
        MATES=tables.softmax_group_of_rank.shape[1],
        BLOCK_M=GATE_TOKENS,
        BLOCK_R=GATE_RANKS,
        num_warps=4,
    )
    return found.view(*shape, ranks)


def splits(dtype: torch.dtype) -> bool:
    """Whether rows are split for a hidden state of this type; the interpreter has no product of bfloat16."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not IS_INTERPRETED)
