"""The two Triton kernels of the fused layer's forward and backward pass: shrink and expand.

    shrink   OUT[s, t, c] = sum over the s-th part of k of X[t, k] M[c, k]           M: A, or W_0, W_1, W_2 and A
    expand   Y_m[t, n] (+)= sum over ranks r of module m of (sum over s of LOW[s, t, r]) g[t, r] B_m[r, n]

Shrink can split the long k axis (split-K), so that even one token occupies the whole GPU. Expand adds the partial sums
in a fixed order: no atomics, no zeroed buffer, deterministic bits. One launch of expand serves all modules of a group.
It accumulates on the base outputs; or writes the update, on which the base products accumulate later; or also adds the
partial sums of the base products, which shrink computes along with those of A if tokens are few: two launches in all.
Both kernels skip tiles whose gates are all 0, a decision made on the device. Sums are float32.

Shrink and expand with partial sums follow vLLM's LoRA kernels (lora_shrink, lora_expand), which have one adapter per
token; here each rank has a gate.
"""

# Triton may be missing, and type checkers do not understand jitted functions.
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton.language as tl

from .triton_launch import jit


@jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    out_ptr,
    gate_ptr,
    index_ptr,
    tokens,
    width,
    columns,  # of A
    n0,  # output features of each base module; 0: no such module
    n1,
    n2,
    k_size,  # of each part, a multiple of BLOCK_K
    x_row,
    x_col,
    a_row,
    w0_row,
    w1_row,
    w2_row,
    out_part,
    out_row,
    gate_row,
    RANK: tl.constexpr,  # length of the gates' axis
    HAS_COLUMNS: tl.constexpr,  # whether index_ptr has the gate of each column
    SKIP_ZEROS: tl.constexpr,  # whether tiles whose gates are all 0 are skipped
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute partial sums of X M^T; see above."""
    block = tl.program_id(1)
    blocks0, blocks1, blocks2 = tl.cdiv(n0, BLOCK_C), tl.cdiv(n1, BLOCK_C), tl.cdiv(n2, BLOCK_C)
    wide = n0 + n1 + n2
    is_base = block < blocks0 + blocks1 + blocks2
    m_ptr, size, m_row, offset = a_ptr, columns, a_row, wide
    if block < blocks0:
        m_ptr, size, m_row, offset = w0_ptr, n0, w0_row, 0
    elif block < blocks0 + blocks1:
        m_ptr, size, m_row, offset = w1_ptr, n1, w1_row, n0
        block -= blocks0
    elif is_base:
        m_ptr, size, m_row, offset = w2_ptr, n2, w2_row, n0 + n1
        block -= blocks0 + blocks1
    else:
        block -= blocks0 + blocks1 + blocks2
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(2)
    in_rows, in_cols = rows < tokens, cols < size
    long_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    is_needed = True
    if SKIP_ZEROS:
        in_cols_of_a = cols < columns
        place = tl.load(index_ptr + cols, mask=in_cols_of_a, other=0) if HAS_COLUMNS else cols % RANK
        gate = tl.load(
            gate_ptr + long_rows[:, None] * gate_row + place[None, :],
            mask=in_rows[:, None] & in_cols_of_a[None, :],
            other=0.0,
        )
        is_needed = is_base | (tl.max(tl.abs(gate)) > 0)
    if is_needed:
        first = part * k_size
        for start in range(first, tl.minimum(first + k_size, width), BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            in_ks = ks < width
            x = tl.load(
                x_ptr + long_rows[:, None] * x_row + ks[None, :] * x_col,
                mask=in_rows[:, None] & in_ks[None, :],
                other=0.0,
            )
            m = tl.load(
                m_ptr + cols[None, :] * m_row + ks[:, None],
                mask=in_cols[None, :] & in_ks[:, None],
                other=0.0,
            )
            if UPCAST:
                x, m = x.to(tl.float32), m.to(tl.float32)
            total = tl.dot(x, m, total, input_precision="ieee")
    out = out_ptr + part * out_part + long_rows[:, None] * out_row + offset + cols[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@jit
def expand_kernel(  # noqa: C901 - most branches are resolved at compile time
    low_ptr,
    gate_ptr,
    index_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    tokens,
    n0,  # output features of each module
    n1,
    n2,
    r0,  # ranks of each module
    r1,
    r2,
    y0_row,
    y1_row,
    y2_row,
    b0_row,
    b1_row,
    b2_row,
    low_part,
    low_row,
    gate_row,
    SPLIT_K: tl.constexpr,
    RANK: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # whether Y is read and added to
    HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr,  # whether LOW starts with the partial sums of the base products
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute Y_m += (g * low_m) B_m for up to three modules, or = without ACCUMULATE; see above."""
    wide = n0 + n1 + n2 if HAS_BASE else 0
    block = tl.program_id(1)
    blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    y_ptr, b_ptr, bias_ptr, features, ranks, y_row, b_row = y0_ptr, b0_ptr, bias0_ptr, n0, r0, y0_row, b0_row
    offset, first = 0, 0
    if block >= blocks0 + blocks1:
        y_ptr, b_ptr, bias_ptr, features, ranks, y_row, b_row = y2_ptr, b2_ptr, bias2_ptr, n2, r2, y2_row, b2_row
        offset, first = r0 + r1, n0 + n1
        block -= blocks0 + blocks1
    elif block >= blocks0:
        y_ptr, b_ptr, bias_ptr, features, ranks, y_row, b_row = y1_ptr, b1_ptr, bias1_ptr, n1, r1, y1_row, b1_row
        offset, first = r0, n0
        block -= blocks0
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < tokens, cols < features
    long_rows = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ranks, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        in_rs = rs < ranks
        inside = in_rows[:, None] & in_rs[None, :]
        place = tl.load(index_ptr + offset + rs, mask=in_rs, other=0) if HAS_COLUMNS else (offset + rs) % RANK
        gate = tl.load(gate_ptr + long_rows[:, None] * gate_row + place[None, :], mask=inside, other=0.0)
        if tl.max(tl.abs(gate)) > 0:
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for part in tl.static_range(SPLIT_K):
                low += tl.load(
                    low_ptr + part * low_part + long_rows[:, None] * low_row + wide + offset + rs[None, :],
                    mask=inside,
                    other=0.0,
                ).to(tl.float32)
            b = tl.load(b_ptr + rs[:, None] * b_row + cols[None, :], mask=in_rs[:, None] & in_cols[None, :], other=0.0)
            gated = low * gate
            if UPCAST:
                b = b.to(tl.float32)
            else:
                gated = gated.to(b.dtype)
            total = tl.dot(gated, b, total, input_precision="ieee")
    y = y_ptr + long_rows[:, None] * y_row + cols[None, :]
    inside = in_rows[:, None] & in_cols[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_BASE:
        for part in tl.static_range(SPLIT_K):
            total += tl.load(
                low_ptr + part * low_part + long_rows[:, None] * low_row + first + cols[None, :],
                mask=inside,
                other=0.0,
            )
    if ACCUMULATE:
        total += tl.load(y, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)
