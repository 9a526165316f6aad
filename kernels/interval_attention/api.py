"""The public functions, and the custom operators that register them with torch.compile and autograd."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from interval_attention.backward import dkdv_kernel, dq_kernel, statistics_kernel
from interval_attention.configs import HEAD_DIMS, Tile, architecture_of, stored_tiles
from interval_attention.forward import forward_kernel
from interval_attention.intervals import RUN, Prepared, prepare

# Fixed when the kernels were decorated, at their import above.
INTERPRETED = triton.knobs.runtime.interpret
# What the programs of a section of heads read in their loops; two sections run at a time, in 40 MB and above.
L2_BYTES = 16 * 2**20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MASK = (
    "Tensor row_start, Tensor row_end, Tensor first_query, Tensor last_query, Tensor? holes, "
    "Tensor row_schedule, Tensor key_schedule"
)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_end: Tensor,
    last_query: Tensor | None = None,
    *,
    has_holes: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query i of row b sees key j where j < row_end[b, i] and i < last_query[b, j].

    q [B, S, H, K]; k, v [B, T, G, K] with G dividing H (grouped-query), any strides; row_end int32 [B, S]
    within 0 .. T, non-decreasing along S if gradients are wanted; last_query int32 [B, T] within 0 .. S,
    non-decreasing along T unless has_holes (see `prepare`), or None: every query sees the keys from 0 on.
    scale is 1 / sqrt(K) by default. Returns o [B, S, H, K], and with return_lse also the natural log of each
    row's sum of exp scores, float32 [B, H, S]. A fully masked row gives zeros, and -inf in lse.

    Derives the bounds by rows and by keys on each call; if layers share a mask, call `prepare` once and
    `prepared_attention` in each layer. The backward pass is deterministic. Raises ValueError for a case that
    the kernels do not support.
    """
    prepared = prepare(row_end, last_query, k.shape[1] if k.ndim == 4 else None, has_holes=has_holes)
    return prepared_attention(q, k, v, prepared, scale=scale, return_lse=return_lse)


def prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as `interval_attention`, with a mask prepared once by `prepare(row_end, last_query, T)`."""
    _check_shapes(q, k, v, prepared)
    check_supported(q.device, q.dtype, q.shape[3])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
    o, lse = torch.ops.interval_attention.forward(q, k, v, *prepared, scale)
    return (o, lse) if return_lse else o


def check_supported(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError for a device, dtype or head_dim that no kernel supports; meant for start-up."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not supported; supported: {', '.join(map(str, DTYPES))}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is not supported; supported: {', '.join(map(str, HEAD_DIMS))}")
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"tensors on {device}: the kernels run on CUDA devices of compute capability 8.0 and above "
            "(and on the CPU under TRITON_INTERPRET=1, for tests)"
        )
    # torch.compile cannot trace this check; the first eager call refuses such a chip.
    traced = torch.compiler.is_compiling()
    if device.type == "cuda" and not traced and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{torch.cuda.get_device_name(device)}: compute capability is below 8.0")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be of shape (batch, seq, heads, head_dim), got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    num_batch, num_rows, num_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != num_batch or k.shape[3] != head_dim or num_heads % k.shape[2]:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must be (batch, keys, groups, head_dim) with the batch "
            f"and head_dim of q {list(q.shape)} and groups dividing its heads"
        )
    mask_shape, key_shape = tuple(prepared.row_end.shape), tuple(prepared.first_query.shape)
    if mask_shape != (num_batch, num_rows) or key_shape != (num_batch, k.shape[1]):
        raise ValueError(
            f"intervals for {list(mask_shape)} queries and {list(key_shape)} keys, but q is {list(q.shape)} "
            f"and k {list(k.shape)}"
        )
    if prepared.row_end.device != q.device:
        raise ValueError(f"row_end is on {prepared.row_end.device}, but q on {q.device}")


@torch.library.custom_op(
    "interval_attention::forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_MASK}, float scale) -> (Tensor, Tensor)",
)
def _forward(q, k, v, row_start, row_end, first_query, last_query, holes, row_schedule, key_schedule, scale):
    o, lse = _empty_outputs(q)
    if o.numel():
        _, num_rows, num_heads, head_dim = q.shape
        tiles = stored_tiles(q.device, head_dim, q.dtype, num_rows)
        tile = tiles.decode if num_rows <= 16 else tiles.forward
        (k_in, v_in), tile = _in_loop((k, v), tile, tile.keys)
        group = num_heads // k.shape[2]
        section = group * _section(k)
        with torch.cuda.device_of(q):
            forward_kernel[_grid(row_schedule, tile.rows, num_heads, section)](
                q, k_in, v_in, o, lse, row_start, row_end, holes, row_schedule, scale,
                *q.stride(), *k.stride(), *v.stride(),
                num_rows, num_heads, group, row_schedule.shape[1], section,
                HOLES=holes is not None, **_blocks(tile, q),
            )  # fmt: skip
    return o, lse


@_forward.register_fake
def _(q, *others):
    return _empty_outputs(q)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    num_batch, num_rows, num_heads, _ = q.shape
    lse = torch.empty((num_batch, num_heads, num_rows), dtype=torch.float32, device=q.device)
    return q.new_empty(q.shape), lse


@torch.library.custom_op(
    "interval_attention::backward",
    mutates_args=(),
    schema=(
        f"(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_MASK}, float scale) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    do,
    dlse,
    q,
    k,
    v,
    o,
    lse,
    row_start,
    row_end,
    first_query,
    last_query,
    holes,
    row_schedule,
    key_schedule,
    scale,
):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    num_batch, num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    if not (q.numel() and k.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    tiles = stored_tiles(q.device, head_dim, q.dtype, num_rows)
    (q_in, do_in), dkdv_tile = _in_loop((q, do), tiles.dkdv, tiles.dkdv.rows)
    (k_in, v_in), dq_tile = _in_loop((k, v), tiles.dq, tiles.dq.keys)
    # A step of dkdv may read a tile past the last row.
    num_padded = triton.cdiv(num_rows, RUN) * RUN + RUN
    statistics = torch.empty((num_batch, num_heads, num_padded), dtype=torch.int64, device=q.device)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())
    group = num_heads // num_kv_heads
    key_section, row_section = _section(q, group), group * _section(k)
    with torch.cuda.device_of(q):
        statistics_kernel[num_padded // tiles.delta.rows, num_heads, num_batch](
            o, do, lse, dlse.contiguous(), statistics.view(torch.float32),
            *do.stride(), num_rows, num_heads, num_padded,
            BLOCK_M=tiles.delta.rows, HEAD_DIM=head_dim, num_warps=tiles.delta.warps,
        )  # fmt: skip
        in_loop = statistics
        if dkdv_tile.tma:
            in_loop = TensorDescriptor.from_tensor(statistics.flatten(), [dkdv_tile.rows])
        dkdv_kernel[_grid(key_schedule, dkdv_tile.keys, num_kv_heads, key_section)](
            q_in, k, v, do_in, in_loop, dk, dv, first_query, last_query, key_schedule, scale, *strides,
            num_keys, num_heads, num_padded, group, key_schedule.shape[1], key_section,
            **_blocks(dkdv_tile, q),
        )  # fmt: skip
        dq_kernel[_grid(row_schedule, dq_tile.rows, num_heads, row_section)](
            q, k_in, v_in, do, statistics, dq, row_start, row_end, holes, row_schedule, scale, *strides,
            num_rows, num_heads, num_padded, group, row_schedule.shape[1], row_section,
            HOLES=holes is not None, **_blocks(dq_tile, q),
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(do, dlse, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx, do, dlse):
    q, k, v, o, lse, *mask = ctx.saved_tensors
    gradients = torch.ops.interval_attention.backward(do, dlse, q, k, v, o, lse, *mask, ctx.scale)
    return (*gradients, *[None] * 8)


_forward.register_autograd(_differentiate, setup_context=_save)


def _section(x: Tensor, group: int = 1) -> int:
    """How many key heads' programs go side by side: as many as divide all, and whose part of two tensors like
    x [B, S, H, K], `group` of its heads to a key head, fits L2."""
    head_bytes = 2 * group * x.shape[1] * x.shape[3] * x.element_size()
    num_heads = x.shape[2] // group
    return max(
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and (n == 1 or n * head_bytes <= L2_BYTES)
    )


def _grid(schedule: Tensor, block: int, num_heads: int, section: int) -> tuple[int, int, int]:
    """The grid that `locate` describes."""
    num_batch, num_runs = schedule.shape[:2]
    return num_runs * (RUN // block) * section, num_heads // section, num_batch


def _in_loop(tensors: tuple[Tensor, Tensor], tile: Tile, block: int) -> tuple[tuple, Tile]:
    """The tensors that a kernel's loop loads, as TMA descriptors if its tile says so and both allow them."""
    if not (tile.tma and all(map(describable, tensors))):
        return tensors, tile._replace(tma=False)
    described = (TensorDescriptor.from_tensor(x, [1, block, 1, x.shape[3]]) for x in tensors)
    return tuple(described), tile


def describable(x: Tensor) -> bool:
    """Whether the hardware supports a TMA descriptor of x [B, S, H, K]: address and strides multiples of
    16 bytes, last stride 1. Other tensors are read through pointers with the same tile.
    """
    *outer, last = x.stride()
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer)
    return last == 1 and aligned and x.data_ptr() % 16 == 0


def _branches(device: torch.device) -> bool:
    """Whether one loop masks in branches. For sm_80 Triton chooses slow layouts for products that a branch
    separates, so there three loops follow each other."""
    return device.type == "cpu" or architecture_of(device) >= 90


def _blocks(tile: Tile, q: Tensor) -> dict[str, int | bool]:
    return {
        "TMA": tile.tma,
        "BRANCH": _branches(q.device),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "HEAD_DIM": q.shape[3],
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
