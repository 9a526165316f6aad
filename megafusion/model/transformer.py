"""Llama's block: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megafusion.model.attention import attention_backend
from megafusion.model.config import ModelConfig
from megafusion.model.modality import Modality, ModalityLinear, ModalityRMSNorm, modality_of
from megafusion.model.rope import Rope, rope_at
from megafusion.model.weights import Replicated, declare
from megafusion.sequence.intervals import Intervals


@dataclass(frozen=True)
class BlockContext:
    """Side inputs of every block besides the residual stream and the cache; made once a batch.

    mask: as the attention backend prepared it. rope: of the positions in a block's products. modality: of the
    same positions; empty in a model without weights for image patches.
    """

    mask: Any
    rope: Rope
    modality: tuple[Modality, ...]


def block_context(
    config: ModelConfig,
    intervals: Intervals,
    positions: Tensor,
    dtype: torch.dtype,
    is_patch_BS: Tensor,
    is_patch_residual_BS: Tensor | None = None,
) -> BlockContext:
    """The context of all blocks of a model; dtype: the residual stream's.

    positions: [B, S], or of `rope_positions` where there are images. is_patch_BS: bool, the positions of
    image patches. is_patch_residual_BS: those of the residual stream, if it has other positions, as with
    sequence parallelism.
    """
    mask = attention_backend(config.attention).prepare(intervals, dtype, config.head_size)
    rope = rope_at(positions, config.head_size, config.rope_theta, config.rope_scaling)
    if config.modality_weights == "none":
        return BlockContext(mask, rope, ())
    residual_BS = is_patch_BS if is_patch_residual_BS is None else is_patch_residual_BS
    return BlockContext(mask, rope, (modality_of(is_patch_BS, residual_BS),))


class LayerCache(Protocol):
    """One layer's keys and values in generation."""

    def update(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of them, [B, T, G, K]."""


class FusedLinear(ModalityLinear):
    """Several linear layers of one input as one matrix product, their outputs side by side."""

    def __init__(self, hidden_size: int, sizes: tuple[int, ...], **options: bool):
        super().__init__(hidden_size, sum(sizes), **options)
        self.sizes = sizes


class SelfAttention(nn.Module):
    """Grouped-query attention in which each query sees the keys of its interval."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, for_patches = config.head_size, config.modality_weights == "all"
        self.num_heads = config.num_heads, config.kv_heads, config.kv_heads
        sizes = tuple(number * self.head_dim for number in self.num_heads)
        qkv = FusedLinear(config.hidden_size, sizes, bias=config.attention_bias, for_patches=for_patches)
        self.qkv = declare(qkv, "column")
        self.q_norm, self.k_norm = _head_norm(config), _head_norm(config)
        self.out = declare(
            ModalityLinear(sizes[0], config.hidden_size, for_patches=for_patches), "row", "residual"
        )
        self.attend = attention_backend(config.attention).attend

    def forward(self, x_BSD: Tensor, context: BlockContext, cache: LayerCache | None = None) -> Tensor:
        modality = context.modality
        heads = self.qkv(x_BSD, *modality).unflatten(-1, (-1, self.head_dim))
        # A rank of tensor parallelism has a share of each.
        q, k, v = heads.split([heads.shape[2] * n // sum(self.num_heads) for n in self.num_heads], dim=2)
        q, k = normed(self.q_norm, q, context), normed(self.k_norm, k, context)
        q, k = context.rope.rotate(q), context.rope.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.out(self.attend(q, k, v, context.mask).flatten(-2), *modality)


def _head_norm(config: ModelConfig) -> nn.Module:
    """The norm of each head's queries or keys, where the model has one."""
    if not config.qk_norm:
        return nn.Identity()
    return declare(_norm(config.head_size, config, config.modality_weights == "all"), Replicated("heads"))


def _norm(size: int, config: ModelConfig, for_patches: bool) -> nn.RMSNorm:
    return (ModalityRMSNorm if for_patches else nn.RMSNorm)(size, eps=config.norm_eps)


def normed(norm: nn.Module, x: Tensor, context: BlockContext) -> Tensor:
    """A norm of the residual stream [B, S, D], or of heads [B, S, H, K], whatever weights it has."""
    if not isinstance(norm, ModalityRMSNorm):
        return norm(x)
    (modality,) = context.modality
    return norm(x, modality.is_patch_residual if x.ndim == 3 else modality.is_patch[..., None])


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. It keeps its input alone, and writes both gradients into one tensor."""

    @staticmethod
    def forward(context, gate_up: Tensor) -> Tensor:  # type: ignore[override]
        context.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(context, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = context.saved_tensors
        gradients = torch.empty_like(gate_up)
        (gate, up), (of_gate, of_up) = gate_up.chunk(2, dim=-1), gradients.chunk(2, dim=-1)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
        return gradients


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F], of both in one tensor, [..., 2 F]."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGLU.apply(gate_up)
    # torch.compile fuses these, and does not take the other's out=; a decoder's few rows are done sooner.
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size, ffn_size = config.hidden_size, config.ffn_size
        for_patches = config.modality_weights != "none"
        gate_up = FusedLinear(size, (ffn_size, ffn_size), for_patches=for_patches, gives_sorted=True)
        self.gate_up = declare(gate_up, "column")
        self.down = declare(ModalityLinear(ffn_size, size, for_patches=for_patches), "row", "residual")

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        return self.down(swiglu(self.gate_up(x_BSD, *context.modality)), *context.modality)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); x + norm(attention(x)) with post_norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.post_norm = config.post_norm
        size, weights = config.hidden_size, config.modality_weights
        self.attention_norm = declare(_norm(size, config, weights == "all"), Replicated("positions"))
        self.attention = SelfAttention(config)
        self.feed_forward_norm = declare(_norm(size, config, weights != "none"), Replicated("positions"))
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, context: BlockContext, cache: LayerCache | None = None) -> Tensor:
        if self.post_norm:
            x_BSD = x_BSD + normed(self.attention_norm, self.attention(x_BSD, context, cache), context)
            return x_BSD + normed(self.feed_forward_norm, self.feed_forward(x_BSD, context), context)
        x_BSD = x_BSD + self.attention(normed(self.attention_norm, x_BSD, context), context, cache)
        return x_BSD + self.feed_forward(normed(self.feed_forward_norm, x_BSD, context), context)
