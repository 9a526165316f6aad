"""The cases of benchmarks/attention.py: layouts, their visible pairs, and the backends."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from interval_attention import check_supported, prepare, prepared_attention
from interval_attention.configs import Tile, stored_tiles
from interval_attention.flash import check_flash, flash_attention, flash_prepare
from interval_attention.reference import dense_mask

FLEX_BLOCK = 128
# Minimum and maximum length of a text segment, patches per image, images per document.
_MIXED = {
    "pairs": (16, 64, 256, 1),
    "interleaved-256": (64, 400, 256, 6),
    "interleaved-1024": (64, 400, 1024, 4),
}
LAYOUTS = ("causal", *_MIXED)


class NotServed(Exception):
    """A backend cannot run a case on this machine; the message says why."""


def layout(name: str, seq: int, shrink: int = 1) -> tuple[Tensor, Tensor]:
    """row_end and last_query, int32 [1, seq]: consecutive documents, the last truncated at the end.

    `shrink` divides every length, for runs on a CPU.
    """
    if name == "causal":
        end = torch.arange(1, seq + 1, dtype=torch.int32)[None]
        return end, torch.full_like(end, seq)
    shortest, longest, patches, num_images = _MIXED[name]
    rng, end, last = random.Random(0), [], []
    while len(end) < seq:
        for _ in range(num_images):
            text = max(1, rng.randint(shortest, longest) // shrink)
            end += range(len(end) + 1, len(end) + text + 1)
            end += [len(end) + patches // shrink] * (patches // shrink)
        last += [len(end)] * (len(end) - len(last))
    cut = torch.tensor([end[:seq], last[:seq]], dtype=torch.int32).clamp_(max=seq)
    return cut[:1], cut[1:]


def visible_pairs(row_end: Tensor, last_query: Tensor) -> int:
    """Number of visible query-key pairs; see `PackedBatch.work`."""
    return int((row_end + last_query - row_end.shape[1]).long().sum())


def tile_pairs(row_start: Tensor, row_end: Tensor, rows: int, keys: int, *, grid: bool) -> int:
    """Number of pairs in the visited tiles of rows x keys; a tile past the end counts in full.

    With `grid`, tiles start at multiples of `keys`, as in block lists; else at the first key that a tile's
    rows see, as in our kernels.
    """
    seq = row_start.shape[1]
    first = row_start[:, ::rows].long()
    last = row_end[:, torch.arange(rows - 1, seq + rows - 1, rows).clamp(max=seq - 1)].long()
    steps = -(-last // keys) - first // keys if grid else -(-(last - first) // keys)
    return int(steps.sum()) * rows * keys


@dataclass
class Inputs:
    """q, k, v and the gradient of the output, [B, S, H, K], and intervals int32 [B, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    row_end: Tensor
    last_query: Tensor

    @classmethod
    def random(cls, bounds: tuple[Tensor, Tensor], batch: int, heads: int, head_dim: int, device, dtype):
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, bounds[0].shape[1], heads, head_dim)
        q, k, v, do = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        return cls(q, k, v, do, *(x.to(device).repeat(batch, 1) for x in bounds))


def intervals_in_kernels(inputs: Inputs) -> Callable:
    try:
        check_supported(inputs.q.device, inputs.q.dtype, inputs.q.shape[3])
    except ValueError as error:
        raise NotServed(str(error)) from error
    prepared = prepare(inputs.row_end, inputs.last_query)
    return partial(prepared_attention, prepared=prepared)


def flash_4(inputs: Inputs) -> Callable:
    try:
        package = check_flash(inputs.q.device, inputs.q.dtype, inputs.q.shape[3])
        prepared = flash_prepare(inputs.row_end, inputs.last_query, inputs.q.shape[1], package)
    except ValueError as error:
        raise NotServed(str(error)) from error
    return partial(flash_attention, prepared=prepared)


def sees_of(row_end: Tensor, last_query: Tensor) -> Callable:
    """The intervals as a mask function of FlexAttention."""

    def sees(row, head, query, key):
        return (key < row_end[row, query]) & (query < last_query[row, key])

    return sees


def make_block_mask(sees: Callable, row_end: Tensor, create: Callable = create_block_mask) -> BlockMask:
    """FlexAttention's block lists; `create` may be the compiled form of its function."""
    (num_batch, seq), device = row_end.shape, str(row_end.device)
    return create(sees, num_batch, None, seq, seq, device=device)


@cache
def compiled(function: Callable) -> Callable:
    """Compiled anew for the shapes of each case, the fastest form of FlexAttention; not compiled on a CPU."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def flex(inputs: Inputs) -> Callable:
    sees = sees_of(inputs.row_end, inputs.last_query)
    mask = make_block_mask(sees, inputs.row_end, compiled(create_block_mask))
    attend = compiled(flex_attention)
    return lambda q, k, v: attend(*heads_first(q, k, v), block_mask=mask).transpose(1, 2)


def sdpa_dense(inputs: Inputs) -> Callable:
    num_bytes = inputs.row_end.numel() * inputs.row_end.shape[1]
    if inputs.q.is_cuda and 8 * num_bytes > torch.cuda.get_device_properties(0).total_memory:
        raise NotServed(f"a dense mask of {num_bytes:,} pairs and its copies do not fit")
    mask = dense_mask(inputs.row_end, inputs.last_query)
    return lambda q, k, v: F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask).transpose(
        1, 2
    )


def sdpa_causal(kind: SDPBackend, inputs: Inputs) -> Callable:
    """A plain causal mask in one of PyTorch's kernels: the upper bound of speed."""
    end = torch.arange(1, inputs.q.shape[1] + 1, device=inputs.q.device)
    if (inputs.last_query != len(end)).any() or (inputs.row_end != end).any():
        raise NotServed("not a plain causal mask")
    if not inputs.q.is_cuda:
        raise NotServed("runs on CUDA only")

    def attend(q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True).transpose(1, 2)

    return attend


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# Each takes Inputs and returns attend(q, k, v) with a prepared mask, or raises NotServed.
BACKENDS: dict[str, Callable[[Inputs], Callable]] = {
    "interval": intervals_in_kernels,
    "flash": flash_4,
    "flex": flex,
    "sdpa": sdpa_dense,
    "sdpa-flash-causal": partial(sdpa_causal, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn-causal": partial(sdpa_causal, SDPBackend.CUDNN_ATTENTION),
}


def computed_pairs(backend: str, inputs: Inputs, direction: str) -> int:
    """Pairs in the tiles that a backend computes; for our backward pass, the mean of its two kernels."""
    seq = inputs.q.shape[1]
    if backend == "sdpa":
        return len(inputs.row_end) * seq**2
    prepared = prepare(inputs.row_end.cpu(), inputs.last_query.cpu())
    bounds = prepared.row_start, prepared.row_end
    if backend != "interval":
        return tile_pairs(*bounds, FLEX_BLOCK, FLEX_BLOCK, grid=True)
    tiles = stored_tiles(inputs.q.device, inputs.q.shape[3], inputs.q.dtype, seq)

    def by_rows(tile: Tile) -> int:
        return tile_pairs(*bounds, tile.rows, tile.keys, grid=False)

    if direction == "forward":
        return by_rows(tiles.forward)
    by_keys = tile_pairs(
        prepared.first_query, prepared.last_query, tiles.dkdv.keys, tiles.dkdv.rows, grid=False
    )
    backward = (by_keys + by_rows(tiles.dq)) // 2
    # A forward pass is 2 matrix products, a backward pass 5.
    return backward if direction == "backward" else (2 * by_rows(tiles.forward) + 5 * backward) // 7
