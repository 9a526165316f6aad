"""Rotary position embedding (Su et al., arXiv 2104.09864), with Llama's pairing of halves."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Cosines and sines of a batch's positions, float32 [B, S, 1, K/2], made once for all layers."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_BSHK: Tensor) -> Tensor:
        """Rotate each pair (x_i, x_{i + K/2}) by its position's angle."""
        first, second = x_BSHK.float().chunk(2, dim=-1)
        rotated = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(rotated, dim=-1).to(x_BSHK.dtype)


def rope_at(positions_BS: Tensor, head_dim: int, theta: float) -> Rope:
    """The rotation of integer positions, with frequencies theta^(-2i/K)."""
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    angles = positions_BS[..., None].float() * theta**-exponent
    return Rope(angles.cos()[:, :, None], angles.sin()[:, :, None])
