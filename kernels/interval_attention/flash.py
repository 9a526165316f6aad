"""The same mask for Tri Dao's kernels: flash-attention 4 with block lists, flash-attention 2 for text only.

Neither has run on a GPU here. Without one, tests check the names of the arguments against the installed
package, and compile its kernels for sm_90 with our mask function.
"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interval_attention.blocks import BlockLists, block_lists
from interval_attention.intervals import row_starts

Package = Literal["flash-attn-4", "flash-attn"]
# The values of head_dim for which flash-attention 4 takes blocks of 128 keys, forward and backward.
HEAD_DIMS = (64, 96, 128)
BLOCK_KEYS = 128


class FlashPrepared(NamedTuple):
    """A batch's mask for `flash_attention`, made once by `flash_prepare`.

    With flash-attn-4: row_end int32 [B, S] and last_query int32 [B, T], padded with zeros to whole blocks; no
    row sees nothing, because flash-attention divides by a row's sum. Lists for the forward pass, by blocks of
    rows, and if S = T for the backward pass, by blocks of keys. With flash-attn: starts of the documents of
    all rows, int32 [documents + 1].
    """

    package: Package
    row_end: Tensor | None = None
    last_query: Tensor | None = None
    block_rows: int = 0
    by_rows: BlockLists | None = None
    by_keys: BlockLists | None = None
    document_starts: Tensor | None = None


def flash_prepare(
    row_end: Tensor, last_query: Tensor | None, num_keys: int, package: Package
) -> FlashPrepared:
    """The mask of `prepare` over num_keys T keys, for the package that `check_flash` named; last_query may
    rise and fall with flash-attn-4.

    For flash-attn this synchronizes with the device, and raises ValueError if a row contains an image.
    """
    num_batch, num_rows = row_end.shape
    if last_query is None:
        last_query = row_end.new_full((num_batch, num_keys), num_rows)
    if package == "flash-attn":
        return FlashPrepared(package, document_starts=document_starts(row_end, last_query))
    block_rows = 256 if _architecture(row_end.device) >= 100 and num_rows > 128 else 128
    row_end = row_end.clamp(1, num_keys)
    by_rows, by_keys = block_lists(row_end, last_query, block_rows, BLOCK_KEYS)
    padded = F.pad(row_end, (0, -num_rows % block_rows)), F.pad(last_query, (0, -num_keys % BLOCK_KEYS))
    return FlashPrepared(package, *padded, block_rows, by_rows, by_keys if num_rows == num_keys else None)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, prepared: FlashPrepared, scale: float | None = None
) -> Tensor:
    """Compute attention [B, S, H, K] as `interval_attention` does; a fully masked row's result is undefined.

    The packages sum dQ in no fixed order, and the call breaks torch.compile's graph.
    """
    call = _flash_4 if prepared.package == "flash-attn-4" else _flash_2
    return call(q, k, v, prepared, scale)


@torch.compiler.disable
def _flash_4(q: Tensor, k: Tensor, v: Tensor, prepared: FlashPrepared, scale: float | None) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale, **flash_4_arguments(prepared))[0]


def flash_4_arguments(prepared: FlashPrepared) -> dict:
    """The arguments of `flash_attn.cute.interface.flash_attn_func` that describe the mask."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from interval_attention.flash_mask import sees

    size = (prepared.block_rows, BLOCK_KEYS)
    assert prepared.by_rows is not None
    arguments = {
        "mask_mod": sees,
        "aux_tensors": [prepared.row_end, prepared.last_query],
        "block_sparse_tensors": BlockSparseTensorsTorch(*prepared.by_rows, block_size=size),
        "pack_gqa": False,
    }
    if prepared.by_keys is not None:
        arguments["block_sparse_tensors_bwd"] = BlockSparseTensorsTorch(*prepared.by_keys, block_size=size)
    return arguments


@torch.compiler.disable
def _flash_2(q: Tensor, k: Tensor, v: Tensor, prepared: FlashPrepared, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    starts, num_rows = prepared.document_starts, q.shape[1]
    o = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=num_rows,
        max_seqlen_k=num_rows,
        softmax_scale=scale,
        causal=True,
    )
    return o.view(q.shape)


def document_starts(row_end: Tensor, last_query: Tensor) -> Tensor:
    """The first position of each document in the concatenated rows, and the end: int32 [documents + 1].

    Raises ValueError for rows that are not consecutive text documents.
    """
    (num_batch, num_rows), num_keys = row_end.shape, last_query.shape[1]
    if num_rows != num_keys:
        raise ValueError(f"flash-attn supports as many queries as keys, not {num_rows} and {num_keys}")
    row_start = row_starts(last_query, num_rows)
    position = torch.arange(num_rows, device=row_start.device)
    begins = row_start == position
    continues = torch.zeros_like(begins)
    continues[:, 1:] = row_start[:, 1:] == row_start[:, :-1]
    others = ((row_end != position + 1) | ~(begins | continues)).nonzero()
    if len(others):
        b, i = others[0].tolist()
        raise ValueError(
            f"flash-attn supports rows of text only, but query {i} of row {b} sees the keys "
            f"{row_start[b, i]} .. {row_end[b, i]}: images need flash-attn-4 or another backend"
        )
    end = torch.tensor([num_batch * num_rows], device=row_start.device)
    return torch.cat([begins.flatten().nonzero()[:, 0], end]).int()


def flash_package(device: torch.device) -> Package:
    """The installed package that supports a chip; raises ValueError with packages and chip if none does."""
    if device.type != "cuda":
        raise ValueError(f"flash-attention runs on CUDA devices, not on {device}")
    architecture, reasons = _architecture(device), []
    supported: dict[Package, tuple[range, str]] = {
        "flash-attn-4": (
            range(90, 120),
            "Hopper and Blackwell (sm_90 to sm_11x), which support block-sparse masks",
        ),
        "flash-attn": (range(80, 120), "sm_80 to sm_11x"),
    }
    for package, (chips, words) in supported.items():
        number = _version(package)
        if number is not None and architecture in chips:
            return package
        reasons.append(f"{package} {number} supports {words}" if number else f"{package} is not installed")
    raise ValueError(f"{torch.cuda.get_device_name(device)}, sm_{architecture}: {'; '.join(reasons)}")


def check_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> Package:
    """The package that supports a case; raises ValueError with package, version and chip if none does."""
    package = flash_package(device)
    reason = _unsupported_reason_4(head_dim) if package == "flash-attn-4" else _unsupported_reason_2(head_dim)
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"supports bfloat16 and float16, not {dtype}"
    if reason:
        chip = f"{torch.cuda.get_device_name(device)}, sm_{_architecture(device)}"
        raise ValueError(f"{chip}: {package} {_version(package)} {reason}")
    return package


def _unsupported_reason_4(head_dim: int) -> str:
    if head_dim not in HEAD_DIMS:
        return f"does not support head_dim {head_dim} by blocks; supported: {', '.join(map(str, HEAD_DIMS))}"
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        return f"cannot be imported ({error})"
    needed = {"mask_mod", "aux_tensors", "block_sparse_tensors", "block_sparse_tensors_bwd", "pack_gqa"}
    missing = needed - set(inspect.signature(flash_attn_func).parameters)
    return f"lacks the arguments {', '.join(sorted(missing))}: install 4.0.0b36" if missing else ""


def _unsupported_reason_2(head_dim: int) -> str:
    if head_dim > 256 or head_dim % 8:
        return f"does not support head_dim {head_dim}; supported: multiples of 8 up to 256"
    try:
        import flash_attn.flash_attn_interface  # noqa: F401
    except ImportError as error:
        return f"cannot be imported ({error})"
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for a device that is not CUDA."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
