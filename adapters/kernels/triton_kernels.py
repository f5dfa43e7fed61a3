"""Two Triton kernels, shrink and expand, from which both passes of the fused layer are made.

    shrink   OUT[s, t, c] = sum over the s-th share of k of X[t, k] M[c, k]          M: A, or W_0, W_1, W_2 and A
    expand   Y_m[t, n] (+)= sum over ranks r of module m of (sum over s of LOW[s, t, r]) g[t, r] B_m[r, n]

Shrink may cut the long k axis into shares that different programs sum, so that one token keeps a whole GPU busy; the
shares are added up by expand, in a fixed order: no atomics, no zeroed buffer, the same bits every time. Expand serves
all modules of a group in one launch. It adds to what the base modules wrote; or writes what their products then add to;
or adds up the shares of those products, which shrink makes along with A where tokens are few: two launches then.
Where no gate of a tile is open, both skip it, decided on the device. Sums are float32.

The cut into shrink and expand with partial sums follows vLLM's LoRA kernels (lora_shrink, lora_expand); theirs have one
adapter for each token, ours a gate for each rank.
"""

# Triton is not always installed, and what it makes of a function is not what a type checker sees.
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton.language as tl

from .triton_launch import kernel


@kernel
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
    n0,  # output features of each base module; 0: none
    n1,
    n2,
    share,  # of the k axis, a multiple of BLOCK_K
    x_row,
    x_col,
    a_row,
    w0_row,
    w1_row,
    w2_row,
    out_share,
    out_row,
    gate_row,
    GATES: tl.constexpr,  # length of the gates' axis
    COLUMNS: tl.constexpr,  # whether there is an index of gates
    SKIP: tl.constexpr,  # whether closed tiles are skipped
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """X M^T, in shares; see above."""
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
    is_open = True
    if SKIP:
        in_cols_of_a = cols < columns
        place = tl.load(index_ptr + cols, mask=in_cols_of_a, other=0) if COLUMNS else cols % GATES
        gate = tl.load(
            gate_ptr + long_rows[:, None] * gate_row + place[None, :],
            mask=in_rows[:, None] & in_cols_of_a[None, :],
            other=0.0,
        )
        is_open = is_base | (tl.max(tl.abs(gate)) > 0)
    if is_open:
        first = part * share
        for start in range(first, tl.minimum(first + share, width), BLOCK_K):
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
    out = out_ptr + part * out_share + long_rows[:, None] * out_row + offset + cols[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@kernel
def expand_kernel(  # noqa: C901 - most branches are taken while it is compiled
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
    low_share,
    low_row,
    gate_row,
    SHARES: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,  # to what is there
    BIAS: tl.constexpr,  # whether the modules' biases are added
    FINISH: tl.constexpr,  # whether LOW has the shares of the base modules' products in front
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Y_m += (g * low_m) B_m for up to three modules, or = without ADD; see above."""
    wide = n0 + n1 + n2 if FINISH else 0
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
        place = tl.load(index_ptr + offset + rs, mask=in_rs, other=0) if COLUMNS else (offset + rs) % GATES
        gate = tl.load(gate_ptr + long_rows[:, None] * gate_row + place[None, :], mask=inside, other=0.0)
        if tl.max(tl.abs(gate)) > 0:
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for part in tl.static_range(SHARES):
                low += tl.load(
                    low_ptr + part * low_share + long_rows[:, None] * low_row + wide + offset + rs[None, :],
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
    if BIAS:
        total += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if FINISH:
        for part in tl.static_range(SHARES):
            total += tl.load(
                low_ptr + part * low_share + long_rows[:, None] * low_row + first + cols[None, :],
                mask=inside,
                other=0.0,
            )
    if ADD:
        total += tl.load(y, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)
