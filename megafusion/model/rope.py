"""Rotary position embedding (Su et al., arXiv 2104.09864), of one axis, or of rows and columns."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megafusion.model.config import ModelConfig, RopeScaling


class Rope(NamedTuple):
    """Of a head's K/2 angles, float32 [B, S, 1, K]: cosines twice; sines negated, then as they are."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_BSHK: Tensor) -> Tensor:
        """Rotate each pair (x_i, x_{i + K/2}), as Llama pairs them, by its position's angle."""
        x = x_BSHK.float()
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([second, first], dim=-1) * self.sin).to(x_BSHK.dtype)


def rope_at(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """The rotation of integer positions, with frequencies theta^(-2i/K), scaled or not.

    positions: [B, S]; or [B, S, A], of A axes, which take turns: frequency i is of axis i mod A.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponent
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    if positions.ndim == 3:
        positions = positions[..., torch.arange(head_dim // 2, device=positions.device) % positions.shape[2]]
    else:
        positions = positions[..., None]
    angles = (positions.float() * frequencies)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return Rope(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequencies: slow ones divided by the factor, fast ones as they are."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = frequencies * scaling.original_max_position_embeddings / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_positions(
    config: ModelConfig, positions_BS: Tensor, patch_index_BS: Tensor, image_size_BN: Tensor
) -> Tensor:
    """The positions that `rope_at` takes: [B, S] with one axis, [B, S, 2] with rows and columns.

    With two, as in Qwen2-VL's M-RoPE (arXiv 2409.12191), the patch in row r and column c of an image whose
    first patch is at position p is at (p + r, p + c), and a text's token at position p is at (p, p): its
    rotation is that of one axis, bit for bit. Unlike there, the text after an image has its place in the
    document, not the one behind the image's last row or column.
    patch_index_BS, image_size_BN: as in `PackedBatch`.
    """
    if config.image_rope == "1d":
        return positions_BS
    num_columns = torch.tensor([columns for _, columns in config.grids])
    num_columns, image_size_BN = (
        x.to(positions_BS.device, torch.int64, non_blocking=True) for x in (num_columns, image_size_BN)
    )
    max_patches = max(config.patches)
    # Clean patches are counted behind the noised ones of all slots.
    index_BS = patch_index_BS.clamp(min=0).long() % (image_size_BN.shape[1] * max_patches)
    slot, patch = index_BS // max_patches, index_BS % max_patches
    columns_BS = num_columns[image_size_BN.gather(1, slot)]
    places = torch.stack([patch // columns_BS, patch % columns_BS], dim=-1)
    of_patches = (positions_BS - patch)[..., None] + places
    return torch.where(patch_index_BS[..., None] >= 0, of_patches, positions_BS[..., None])
