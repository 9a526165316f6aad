"""The forward pass: flash-attention 2 over the keys that a tile of queries sees."""

import triton
import triton.language as tl

from interval_attention.tiles import at_head, bounds, edge_step, load_rows, load_tile, locate, steps


@triton.jit
def _attend(
    acc, total, peak, q, k, v, b, kv_head, first, high, start, end, scale2, s_kt, s_kd, s_vt, s_vd,
    MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One step of online softmax in base 2 over keys first .. first + BLOCK_N."""
    k_ND = load_tile(k, b, kv_head, first, s_kt, s_kd, high, MASKED, TMA, BLOCK_N, HEAD_DIM)
    s = tl.dot(q, tl.trans(k_ND), input_precision="ieee")
    if MASKED:
        keys = first + tl.arange(0, BLOCK_N)
        seen = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        s = tl.where(seen, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale2)
    # A row without a visible key so far has a peak of -inf, of which exp2 would make NaN: use 0.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = tl.exp2(s * scale2 - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    v_ND = load_tile(v, b, kv_head, first, s_vt, s_vd, high, MASKED, TMA, BLOCK_N, HEAD_DIM)
    acc = tl.dot(p.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def forward_kernel(
    q, k, v, o, lse, row_start, row_end, order, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd,
    num_rows, num_keys, num_heads, group, num_runs,
    RUN: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """o [B, S, H, K] and lse [B, H, S], contiguous; one program per tile of BLOCK_M queries of a head."""
    b, head, first_row = locate(order, num_runs, num_heads, RUN, BLOCK_M)
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    inside = rows[:, None] < num_rows
    start, end = load_rows(row_start + b * num_rows, row_end + b * num_rows, rows, num_rows, num_keys)
    low, inner_low, inner_high, high = bounds(start, end)
    full_low, full_high, num_left, num_edges = steps(low, inner_low, inner_high, high, BLOCK_N)

    q += b * s_qb + head.to(tl.int64) * s_qh
    kv_head = head // group
    k = at_head(k, b, kv_head, s_kb, s_kg, TMA)
    v = at_head(v, b, kv_head, s_vb, s_vg, TMA)
    rows64 = rows.to(tl.int64)
    q_MD = tl.load(q + rows64[:, None] * s_qs + d[None, :] * s_qd, mask=inside, other=0.0)
    scale2 = scale * 1.4426950408889634  # log2(e)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for masked in tl.static_range(2):  # the full steps, then the edge steps
        for i in range(0, num_edges if masked else (full_high - full_low) // BLOCK_N):
            first = edge_step(i, low, full_high, num_left, BLOCK_N) if masked else full_low + i * BLOCK_N
            acc, total, peak = _attend(
                acc, total, peak, q_MD, k, v, b, kv_head, first, high, start, end, scale2,
                s_kt, s_kd, s_vt, s_vd, masked, TMA, BLOCK_N, HEAD_DIM,
            )  # fmt: skip

    some = start < end
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    natural = (peak + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453  # ln(2)
    o_at = o + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(o_at, acc.to(o.dtype.element_ty), mask=inside)
    lse_at = lse + (b * num_heads + head) * num_rows + rows64
    tl.store(lse_at, tl.where(some, natural, float("-inf")), mask=rows < num_rows)
