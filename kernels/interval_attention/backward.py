"""The backward pass: dK and dV by tiles of keys, dQ by tiles of queries.

Each gradient is summed by one program in one order, without atomics: the backward pass is deterministic.
"""

import triton
import triton.language as tl

from interval_attention.tiles import at_head, bounds, edge_step, load_rows, load_tile, locate, steps


@triton.jit
def delta_kernel(
    o, do, lse, dlse, delta, lse2,
    s_gb, s_gs, s_gh, s_gd, num_rows, num_heads,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(o x do) - dlse, and lse in base 2 with +inf (so p = 0) for fully masked rows.

    The gradient of a score is p (dp - rowsum(o x do)) + p dlse, hence dlse is part of delta.
    """
    tiles = tl.cdiv(num_rows, BLOCK_M)
    pid = tl.program_id(0)
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = pid // tiles % num_heads
    b = (pid // tiles // num_heads).to(tl.int64)
    inside = rows < num_rows
    d = tl.arange(0, HEAD_DIM)
    rows64 = rows.to(tl.int64)
    o_at = o + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    do_at = do + b * s_gb + head.to(tl.int64) * s_gh + rows64[:, None] * s_gs + d[None, :] * s_gd
    o_MD = tl.load(o_at, mask=inside[:, None], other=0.0).to(tl.float32)
    do_MD = tl.load(do_at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = (b * num_heads + head) * num_rows + rows64
    dlse_M = tl.load(dlse + at, mask=inside, other=0.0)
    lse_M = tl.load(lse + at, mask=inside, other=0.0)
    tl.store(delta + at, tl.sum(o_MD * do_MD, 1) - dlse_M, mask=inside)
    base2 = tl.where(lse_M == float("-inf"), float("inf"), lse_M * 1.4426950408889634)
    tl.store(lse2 + at, base2, mask=inside)


@triton.jit
def _add_dkdv(
    dk, dv, k_ND, v_ND, q, do, delta, lse2, b, head, row_start, row_end, keys, first, high, num_keys, scale2,
    s_qs, s_qd, s_gs, s_gd,
    MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add the contribution of query rows first .. first + BLOCK_M of one head to a tile's dK and dV."""
    rows = first + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q, b, head, first, s_qs, s_qd, high, MASKED, TMA, BLOCK_M, HEAD_DIM)
    lse2_M = tl.load(lse2 + rows, mask=rows < high, other=0.0) if MASKED else tl.load(lse2 + rows)
    s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
    p_NM = tl.exp2(s_NM * scale2 - lse2_M[None, :])
    if MASKED:
        start, end = load_rows(row_start, row_end, rows, high, num_keys)
        seen = (keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :])
        p_NM = tl.where(seen, p_NM, 0.0)
    do_MD = load_tile(do, b, head, first, s_gs, s_gd, high, MASKED, TMA, BLOCK_M, HEAD_DIM)
    delta_M = tl.load(delta + rows, mask=rows < high, other=0.0) if MASKED else tl.load(delta + rows)
    dv = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv, input_precision="ieee")
    dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision="ieee")
    ds_NM = p_NM * (dp_NM - delta_M[None, :])
    dk = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, do, delta, lse2, dk, dv, row_start, row_end, first_row, last_row, order, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd, s_gb, s_gs, s_gh, s_gd,
    num_rows, num_keys, num_heads, group, num_runs,
    RUN: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, T, G, K], contiguous; one program per tile of BLOCK_N keys of a key head."""
    num_kv_heads = num_heads // group
    b, kv_head, first_key = locate(order, num_runs, num_kv_heads, RUN, BLOCK_N)
    if first_key >= num_keys:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    keys64 = keys.to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    inside = keys[:, None] < num_keys
    last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
    # Rows that see some key of the tile, and rows that see all of them.
    low = tl.load(first_row + b * num_keys + first_key)
    inner_low = tl.load(first_row + b * num_keys + last_key)
    inner_high = tl.load(last_row + b * num_keys + first_key)
    high = tl.load(last_row + b * num_keys + last_key)
    full_low, full_high, num_left, num_edges = steps(low, inner_low, inner_high, high, BLOCK_M)

    k += b * s_kb + kv_head.to(tl.int64) * s_kg
    v += b * s_vb + kv_head.to(tl.int64) * s_vg
    k_ND = tl.load(k + keys64[:, None] * s_kt + d[None, :] * s_kd, mask=inside, other=0.0)
    v_ND = tl.load(v + keys64[:, None] * s_vt + d[None, :] * s_vd, mask=inside, other=0.0)
    row_start += b * num_rows
    row_end += b * num_rows
    scale2 = scale * 1.4426950408889634
    dk_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    # One loop over the steps of all query heads of the group: a loop in a loop makes these kernels spill.
    delta += b * num_heads * num_rows
    lse2 += b * num_heads * num_rows
    for masked in tl.static_range(2):  # the full steps, then the edge steps
        num_steps = num_edges if masked else (full_high - full_low) // BLOCK_M
        for i in range(0, num_steps * group):
            head = (kv_head * group + i // num_steps).to(tl.int64)
            n = i % num_steps
            first = edge_step(n, low, full_high, num_left, BLOCK_M) if masked else full_low + n * BLOCK_M
            dk_ND, dv_ND = _add_dkdv(
                dk_ND, dv_ND, k_ND, v_ND, at_head(q, b, head, s_qb, s_qh, TMA),
                at_head(do, b, head, s_gb, s_gh, TMA), delta + head * num_rows, lse2 + head * num_rows,
                b, head, row_start, row_end, keys, first, high, num_keys, scale2,
                s_qs, s_qd, s_gs, s_gd, masked, TMA, BLOCK_M, HEAD_DIM,
            )  # fmt: skip

    at = ((b * num_keys + keys64) * num_kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(dk + at, (dk_ND * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_ND.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _add_dq(
    dq, q_MD, do_MD, lse2_M, delta_M, k, v, b, kv_head, first, high, start, end, scale2,
    s_kt, s_kd, s_vt, s_vd,
    MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys first .. first + BLOCK_N to a tile's dQ."""
    k_ND = load_tile(k, b, kv_head, first, s_kt, s_kd, high, MASKED, TMA, BLOCK_N, HEAD_DIM)
    v_ND = load_tile(v, b, kv_head, first, s_vt, s_vd, high, MASKED, TMA, BLOCK_N, HEAD_DIM)
    s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    p = tl.exp2(s * scale2 - lse2_M[:, None])
    if MASKED:
        keys = first + tl.arange(0, BLOCK_N)
        seen = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do_MD, tl.trans(v_ND), input_precision="ieee")
    ds = p * (dp - delta_M[:, None])
    return tl.dot(ds.to(k_ND.dtype), k_ND, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    q, k, v, do, delta, lse2, dq, row_start, row_end, order, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd, s_gb, s_gs, s_gh, s_gd,
    num_rows, num_keys, num_heads, group, num_runs,
    RUN: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dq [B, S, H, K], contiguous; one program per tile of BLOCK_M queries of a head."""
    b, head, tile_row = locate(order, num_runs, num_heads, RUN, BLOCK_M)
    if tile_row >= num_rows:
        return
    rows = tile_row + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    inside = rows < num_rows
    start, end = load_rows(row_start + b * num_rows, row_end + b * num_rows, rows, num_rows, num_keys)
    low, inner_low, inner_high, high = bounds(start, end)
    full_low, full_high, num_left, num_edges = steps(low, inner_low, inner_high, high, BLOCK_N)

    q += b * s_qb + head.to(tl.int64) * s_qh
    do += b * s_gb + head.to(tl.int64) * s_gh
    kv_head = head // group
    k = at_head(k, b, kv_head, s_kb, s_kg, TMA)
    v = at_head(v, b, kv_head, s_vb, s_vg, TMA)
    q_MD = tl.load(q + rows64[:, None] * s_qs + d[None, :] * s_qd, mask=inside[:, None], other=0.0)
    do_MD = tl.load(do + rows64[:, None] * s_gs + d[None, :] * s_gd, mask=inside[:, None], other=0.0)
    at = (b * num_heads + head) * num_rows + rows64
    lse2_M = tl.load(lse2 + at, mask=inside, other=float("inf"))
    delta_M = tl.load(delta + at, mask=inside, other=0.0)
    scale2 = scale * 1.4426950408889634
    dq_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for masked in tl.static_range(2):  # the full steps, then the edge steps
        for i in range(0, num_edges if masked else (full_high - full_low) // BLOCK_N):
            first = edge_step(i, low, full_high, num_left, BLOCK_N) if masked else full_low + i * BLOCK_N
            dq_MD = _add_dq(
                dq_MD, q_MD, do_MD, lse2_M, delta_M, k, v, b, kv_head, first, high, start, end, scale2,
                s_kt, s_kd, s_vt, s_vd, masked, TMA, BLOCK_N, HEAD_DIM,
            )  # fmt: skip
    dq_at = dq + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(dq_at, (dq_MD * scale).to(dq.dtype.element_ty), mask=inside[:, None])
