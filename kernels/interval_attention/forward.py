"""The forward pass: flash-attention 2 over the keys that a tile of queries sees."""

import triton
import triton.language as tl

from interval_attention.tiles import at_edges, at_head, hole_bounds, load_tile, locate, mask_scores, steps

# The peak of a row that has seen no key yet: finite, so that exp2 of differences is never NaN.
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def forward_kernel(
    q, k, v, o, lse, row_start, row_end, holes, schedule, scale,
    s_qb, s_qs, s_qh, s_qd, s_kb, s_kt, s_kg, s_kd, s_vb, s_vt, s_vg, s_vd,
    num_rows, num_heads, group, num_runs, section,
    TMA: tl.constexpr, BRANCH: tl.constexpr, HOLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """o [B, S, H, K] and lse [B, H, S], contiguous; one program per tile of BLOCK_M queries of a head."""
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
    q_MD = tl.load(q + rows64[:, None] * s_qs + d[None, :] * s_qd, mask=inside[:, None], other=0.0)
    row_start += b * num_rows + rows
    row_end += b * num_rows + rows
    holes = hole_bounds(holes, b, num_rows, rows, HOLES)
    kv_head = head // group
    k = at_head(k, b, kv_head, s_kb, s_kg, TMA)
    v = at_head(v, b, kv_head, s_vb, s_vg, TMA)
    scale2 = scale * 1.4426950408889634  # log2(e)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
    for part in tl.static_range(1 if BRANCH else 3):
        start, end, hole = at_edges(row_start, row_end, holes, inside, part, BRANCH, HOLES)
        begin, num_steps, turn, jump = steps(
            part, low, inner_low, inner_high, high, gap, BRANCH, HOLES, BLOCK_N
        )
        for i in range(0, num_steps):  # online softmax in base 2
            first = begin + i * BLOCK_N
            if HOLES:
                first += tl.where(i >= turn, jump, 0)
            k_ND = load_tile(k, b, kv_head, first, s_kt, s_kd, high, part != 1, TMA, BLOCK_N, HEAD_DIM)
            s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
            s = mask_scores(
                s, start, end, hole, inside, first, inner_low, inner_high, gap, part, BRANCH, HOLES
            )
            new_peak = tl.maximum(peak, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(p, 1)
            v_ND = load_tile(v, b, kv_head, first, s_vt, s_vd, high, part != 1, TMA, BLOCK_N, HEAD_DIM)
            acc = tl.dot(p.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision="ieee")
            peak = new_peak

    some = tl.load(row_start, mask=inside, other=0) < tl.load(row_end, mask=inside, other=0)
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    natural = (peak + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453  # ln(2)
    o_at = o + ((b * num_rows + rows64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(o_at, acc.to(o.dtype.element_ty), mask=inside[:, None])
    lse_at = lse + (b * num_heads + head) * num_rows + rows64
    tl.store(lse_at, tl.where(some, natural, float("-inf")), mask=inside)
