"""The backward pass: dK and dV by tiles of keys, dQ by tiles of queries.

Each gradient is summed by one program in one order, without atomics: the backward pass is deterministic.
"""

import triton
import triton.language as tl

from interval_attention.tiles import at_edges, at_head, hole_bounds, load_tile, locate, mask_scores, steps


@triton.jit
def statistics_kernel(
    o, do, lse, dlse, statistics,
    s_gb, s_gs, s_gh, s_gd, num_rows, num_heads, num_padded,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """statistics [B, H, padded rows, 2]: lse in base 2, and delta = rowsum(o x do) - dlse.

    The gradient of a score is p (dp - rowsum(o x do)) + p dlse, hence dlse is part of delta. Fully masked and
    padded rows have an lse of +inf, so p = 0.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    inside = rows < num_rows
    d = tl.arange(0, HEAD_DIM)
    rows64 = rows.to(tl.int64)
    o_at = o + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    do_at = do + b * s_gb + head.to(tl.int64) * s_gh + rows64[:, None] * s_gs + d[None, :] * s_gd
    o_MD = tl.load(o_at, mask=inside[:, None], other=0.0).to(tl.float32)
    do_MD = tl.load(do_at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = (b * num_heads + head) * num_rows + rows64
    dlse_M = tl.load(dlse + at, mask=inside, other=0.0)
    lse_M = tl.load(lse + at, mask=inside, other=float("-inf"))
    base2 = tl.where(lse_M == float("-inf"), float("inf"), lse_M * 1.4426950408889634)
    at = statistics + 2 * ((b * num_heads + head) * num_padded + rows64)
    tl.store(at[:, None] + tl.arange(0, 2)[None, :], tl.join(base2, tl.sum(o_MD * do_MD, 1) - dlse_M))


@triton.jit
def _unpack(statistics):
    """(lse in base 2, delta) of two float32 in one int64, which one load of 8 bytes reads."""
    return (
        (statistics & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True),
        (statistics >> 32).to(tl.int32).to(tl.float32, bitcast=True),
    )


@triton.jit
def dkdv_kernel(
    q, k, v, do, statistics, dk, dv, first_query, last_query, schedule, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd, s_gb, s_gs, s_gh, s_gd,
    num_keys, num_heads, num_padded, group, num_runs, section,
    TMA: tl.constexpr, BRANCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, T, G, K], contiguous; one program per tile of BLOCK_N keys of a key head."""
    b, kv_head, first_key, low, inner_low, inner_high, high, gap = locate(
        schedule, num_runs, section, BLOCK_N, False
    )
    if first_key >= num_keys:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    keys64 = keys.to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    inside = keys < num_keys
    k += b * s_kb + kv_head.to(tl.int64) * s_kg
    v += b * s_vb + kv_head.to(tl.int64) * s_vg
    k_ND = tl.load(k + keys64[:, None] * s_kt + d[None, :] * s_kd, mask=inside[:, None], other=0.0)
    v_ND = tl.load(v + keys64[:, None] * s_vt + d[None, :] * s_vd, mask=inside[:, None], other=0.0)
    first_query += b * num_keys + keys
    last_query += b * num_keys + keys
    scale2 = scale * 1.4426950408889634
    dk_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    # One loop over the steps of all query heads of the group: a loop in a loop makes these kernels spill.
    low &= -2  # a descriptor's box begins at a multiple of 16 bytes, the statistics of two rows
    for part in tl.static_range(1 if BRANCH else 3):
        start, end, hole = at_edges(first_query, last_query, 0, inside, part, BRANCH, False)
        begin, num_steps, _, _ = steps(part, low, inner_low, inner_high, high, gap, BRANCH, False, BLOCK_M)
        first = begin
        head = kv_head * group
        for _ in range(0, num_steps * group):
            q_at = at_head(q, b, head, s_qb, s_qh, TMA)
            q_MD = load_tile(q_at, b, head, first, s_qs, s_qd, high, part != 1, TMA, BLOCK_M, HEAD_DIM)
            at = (b * num_heads + head) * num_padded + first
            if TMA:
                lse2_M, delta_M = _unpack(statistics.load([at.to(tl.int32)]))
            else:
                lse2_M, delta_M = _unpack(tl.load(statistics + at + tl.arange(0, BLOCK_M)))
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
            s_NM = mask_scores(
                s_NM, start, end, hole, inside, first, inner_low, inner_high, gap, part, BRANCH, False
            )
            p_NM = tl.exp2(s_NM * scale2 - lse2_M[None, :])
            do_at = at_head(do, b, head, s_gb, s_gh, TMA)
            do_MD = load_tile(do_at, b, head, first, s_gs, s_gd, high, part != 1, TMA, BLOCK_M, HEAD_DIM)
            dv_ND = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv_ND, input_precision="ieee")
            dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision="ieee")
            ds_NM = p_NM * (dp_NM - delta_M[None, :])
            dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
            first += BLOCK_M
            wraps = first >= begin + num_steps * BLOCK_M
            head += wraps.to(tl.int32)
            first = tl.where(wraps, begin, first)

    some = (tl.load(first_query, mask=inside, other=0) < tl.load(last_query, mask=inside, other=0))[:, None]
    at = ((b * num_keys + keys64) * (num_heads // group) + kv_head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(dk + at, tl.where(some, dk_ND * scale, 0.0).to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + at, tl.where(some, dv_ND, 0.0).to(dv.dtype.element_ty), mask=inside[:, None])


@triton.jit
def dq_kernel(
    q, k, v, do, statistics, dq, row_start, row_end, holes, schedule, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd, s_gb, s_gs, s_gh, s_gd,
    num_rows, num_heads, num_padded, group, num_runs, section,
    TMA: tl.constexpr, BRANCH: tl.constexpr, HOLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dq [B, S, H, K], contiguous; one program per tile of BLOCK_M queries of a head."""
    b, head, first_row, low, inner_low, inner_high, high, gap = locate(
        schedule, num_runs, section, BLOCK_M, HOLES
    )
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    inside = rows < num_rows
    q += b * s_qb + head.to(tl.int64) * s_qh
    do += b * s_gb + head.to(tl.int64) * s_gh
    q_MD = tl.load(q + rows64[:, None] * s_qs + d[None, :] * s_qd, mask=inside[:, None], other=0.0)
    do_MD = tl.load(do + rows64[:, None] * s_gs + d[None, :] * s_gd, mask=inside[:, None], other=0.0)
    lse2_M, delta_M = _unpack(tl.load(statistics + (b * num_heads + head) * num_padded + rows64))
    row_start += b * num_rows + rows
    row_end += b * num_rows + rows
    holes = hole_bounds(holes, b, num_rows, rows, HOLES)
    kv_head = head // group
    k = at_head(k, b, kv_head, s_kb, s_kg, TMA)
    v = at_head(v, b, kv_head, s_vb, s_vg, TMA)
    scale2 = scale * 1.4426950408889634
    dq_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for part in tl.static_range(1 if BRANCH else 3):
        start, end, hole = at_edges(row_start, row_end, holes, inside, part, BRANCH, HOLES)
        begin, num_steps, turn, jump = steps(
            part, low, inner_low, inner_high, high, gap, BRANCH, HOLES, BLOCK_N
        )
        for i in range(0, num_steps):
            first = begin + i * BLOCK_N
            if HOLES:
                first += tl.where(i >= turn, jump, 0)
            k_ND = load_tile(k, b, kv_head, first, s_kt, s_kd, high, part != 1, TMA, BLOCK_N, HEAD_DIM)
            v_ND = load_tile(v, b, kv_head, first, s_vt, s_vd, high, part != 1, TMA, BLOCK_N, HEAD_DIM)
            s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
            s = mask_scores(
                s, start, end, hole, inside, first, inner_low, inner_high, gap, part, BRANCH, HOLES
            )
            p = tl.exp2(s * scale2 - lse2_M[:, None])
            dp = tl.dot(do_MD, tl.trans(v_ND), input_precision="ieee")
            ds = p * (dp - delta_M[:, None])
            dq_MD = tl.dot(ds.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    dq_at = dq + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(dq_at, (dq_MD * scale).to(dq.dtype.element_ty), mask=inside[:, None])
