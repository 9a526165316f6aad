"""Llama's block: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.model.attention import BACKENDS
from megafusion.model.config import Backend
from megafusion.model.rope import Rope
from megafusion.sequence.intervals import Intervals


class LayerCache(Protocol):
    """One layer's keys and values in generation."""

    def update(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of them, [B, T, G, K]."""


class FusedLinear(nn.Linear):
    """Several linear layers of one input, without biases, as one matrix product."""

    def __init__(self, hidden_size: int, sizes: tuple[int, ...]):
        super().__init__(hidden_size, sum(sizes), bias=False)
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., hidden_size] -> one tensor [..., size] for each of the sizes."""
        return super().forward(x).split(self.sizes, dim=-1)


class SelfAttention(nn.Module):
    """Queries see the keys of their interval."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, backend: Backend):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        sizes = (num_heads * self.head_dim, num_kv_heads * self.head_dim, num_kv_heads * self.head_dim)
        self.qkv = FusedLinear(hidden_size, sizes)
        self.out = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        self.attend = BACKENDS[backend]

    def forward(
        self, x_BSD: Tensor, intervals: Intervals, rope: Rope, cache: LayerCache | None = None
    ) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BSD))
        q, k = rope.rotate(q), rope.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.out(self.attend(q, k, v, intervals).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int):
        super().__init__()
        self.gate_up = FusedLinear(hidden_size, (ffn_hidden_size, ffn_hidden_size))
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSD)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_hidden_size: int,
        backend: Backend,
        norm_eps: float,
    ):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.attention = SelfAttention(hidden_size, num_heads, num_kv_heads, backend)
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.feed_forward = FeedForward(hidden_size, ffn_hidden_size)

    def forward(
        self, x_BSD: Tensor, intervals: Intervals, rope: Rope, cache: LayerCache | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), intervals, rope, cache)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
