"""Forward passes over a key-value cache, for a batch of rows: prompts, one token each, or one image each."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megafusion.generate.cache import KVCache
from megafusion.model.rope import rope_positions
from megafusion.model.transformer import BlockContext, block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.objective.sampler import apply_guidance, rescale_guidance
from megafusion.sequence.packing import PackedBatch


class Guide(NamedTuple):
    """Classifier-free guidance away from a context, on what the rows have and it lacks.

    cache: of as many rows, up to their boi. scale: 1 is no guidance. A guided prediction p becomes
    q + scale (p - q), with q the prediction in this context. logits [B, V]: of the token after the boi, which
    images of codes begin with.
    """

    cache: KVCache
    scale: float
    logits: Tensor | None = None


@dataclass
class DenoisingStep:
    """The images of some rows after a denoising step.

    step: from 1 to num_steps. timestep: as the model took it. latents: float32 [B, C, H, W].
    clean: gives latents of the same shape, without noise, as the model expects them now.
    Images of codes have a step for each code: see `sample_codes`.
    """

    step: int
    num_steps: int
    timestep: Tensor
    latents: Tensor = field(repr=False)
    clean: Callable[[], Tensor] = field(repr=False)


class Decoder:
    """Stem, blocks and tail of a model over a cache. No method computes gradients."""

    def __init__(self, model: Transfusion):
        self.model = model
        _set_weight_layout(model)

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """An empty cache for this model."""
        return KVCache.empty(num_rows, capacity, self.model.config, like=self.model.tail.head.weight)

    @torch.no_grad()
    def read_prompts(self, cache: KVCache, batch: PackedBatch, lengths_B: Tensor) -> Tensor:
        """Prefill with prompts of texts and clean images; next-token logits [B, V].

        The batch holds one document per row from position 0; lengths_B int64 [B] are their lengths. Images
        have t = 0.
        """
        own = torch.arange(int(lengths_B.max()), device=batch.tokens.device)
        tokens, patch_index, row_end = (
            each[:, : len(own)] for each in (batch.tokens, batch.patch_index, batch.row_end)
        )
        row_end = torch.where(own < lengths_B[:, None], row_end, 0)
        timesteps = self.model.objective.noise_process.timesteps(batch.t)
        x_BSD, _ = self.model.stem(tokens, patch_index, batch.latents, timesteps, batch.image_size)
        context = self._context(cache, row_end, patch_index, batch.image_size, may_be_empty=True)
        hidden_BSD = self._run(cache, x_BSD, context)
        cache.advance(lengths_B)
        last = (lengths_B - 1)[:, None, None].expand(-1, 1, hidden_BSD.shape[-1])
        return self.model.tail.head(hidden_BSD.gather(1, last))[:, 0]

    @torch.no_grad()
    def read_tokens(self, cache: KVCache, tokens_B: Tensor, is_read_B: Tensor | None = None) -> Tensor:
        """Append one token to each row; next-token logits [B, V].

        is_read_B: bool, false for rows that are left as they are, whose logits mean nothing.
        """
        ones = torch.ones_like(tokens_B)
        counts = ones if is_read_B is None else is_read_B.to(tokens_B.dtype)
        x_BSD = self.model.stem.embedding(tokens_B[:, None])
        context = self._context(cache, counts[:, None], -ones[:, None], may_be_empty=is_read_B is not None)
        hidden_BSD = self._run(cache, x_BSD, context)
        cache.advance(counts)
        return self.model.tail.head(hidden_BSD)[:, 0]

    @torch.no_grad()
    def denoise(
        self,
        cache: KVCache,
        guides: Sequence[Guide],
        noise_BCHW: Tensor,
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Iterator["DenoisingStep"]:
        """Denoise one image after each row's boi, step by step, then append it, clean.

        noise_BCHW: unit normal, float32, of the size that the boi tokens stand for, equal for all rows. The
        sampler's arithmetic keeps its dtype, whatever the model's.
        guides: see Guide; applied in order. generators: of each row, for stochastic samplers.
        The receiver of a step may change its latents, of which the next step takes its own.
        """
        process = self.model.objective.noise_process
        sampler = process.sampler(sampling)
        first, last = sampling.guidance_interval
        everything, latents = cache, noise_BCHW
        for guide in guides:
            everything = everything.concatenate(guide.cache)
        # A row's image stays where it is: the mask and the rotary angles are the same in every step.
        alone = self._image_context(cache, latents)
        together = self._image_context(everything, latents) if guides else alone
        for index, (timestep, t) in enumerate(zip(sampler.timesteps, sampler.times.tolist(), strict=True)):
            is_guided = bool(guides) and first <= t <= last
            copies = [latents] * (1 + len(guides) if is_guided else 1)
            where = (everything, together) if is_guided else (cache, alone)
            predictions = self._predict(*where, torch.cat(copies), timestep)
            conditional, *others = predictions.chunk(len(copies))
            prediction = conditional
            for guide, other in zip(guides, others, strict=False):
                prediction = apply_guidance(prediction, other, guide.scale)
            if is_guided and sampling.guidance_rescale:
                prediction = rescale_guidance(prediction, conditional, sampling.guidance_rescale)
            after = sampler.step(prediction, timestep, latents, generators).prev_sample
            clean = partial(process.clean, prediction, latents, torch.full((len(latents),), t).to(latents))
            state = DenoisingStep(index + 1, len(sampler.timesteps), timestep, after, clean)
            yield state
            latents = state.latents
        # Later tokens must attend to the clean image: its keys and values replace those of the noised one.
        self._predict(cache, alone, latents, process.timesteps(torch.zeros(())))
        cache.advance(torch.full_like(cache.lengths, math.prod(self._grid(latents))))

    def _image_context(self, cache: KVCache, latents: Tensor) -> BlockContext:
        """The context of passes over an image after each row, for which it allocates slots."""
        grid, config = self._grid(latents), self.model.config
        num = math.prod(grid)
        end = torch.full((len(cache.lengths), num), num, device=latents.device)
        if config.image_attention == "causal":
            end = torch.arange(1, num + 1, device=end.device).expand_as(end)
        index_BP = torch.arange(num, device=end.device).expand_as(end)
        size_B1 = torch.full_like(end[:, :1], config.grids.index(grid))
        return self._context(cache, end, index_BP, size_B1, may_be_empty=False)

    def _predict(
        self, cache: KVCache, context: BlockContext, latents_BCHW: Tensor, timestep: Tensor
    ) -> Tensor:
        """The model's prediction, float32 [B, C, H, W], for noised latents after each row."""
        timesteps_B = timestep.expand(len(latents_BCHW)).to(latents_BCHW.device)
        dtype = self.model.tail.head.weight.dtype
        patches_BPD, skips = self.model.stem.adapter.encode(latents_BCHW.to(dtype), timesteps_B)
        hidden_BPD = self._run(cache, patches_BPD, context)
        grid = self._grid(latents_BCHW)
        return self.model.tail.adapter.decode(hidden_BPD, timesteps_B, skips, grid).float()

    def _grid(self, latents_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = latents_BCHW.shape[2:]
        return height // self.model.config.patch_size, width // self.model.config.patch_size

    def _context(
        self,
        cache: KVCache,
        row_end_BS: Tensor,
        patch_index_BS: Tensor,
        image_size_BN: Tensor | None = None,
        *,
        may_be_empty: bool,
    ) -> BlockContext:
        """The context of new positions; without sizes of images they are text."""
        config, dtype = self.model.config, self.model.tail.head.weight.dtype
        positions, intervals = cache.allocate(row_end_BS, may_be_empty)
        if image_size_BN is not None:
            positions = rope_positions(config, positions, patch_index_BS, image_size_BN)
        return block_context(config, intervals, positions, dtype, patch_index_BS >= 0)

    def _run(self, cache: KVCache, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Hidden states of the positions that a context was made for."""
        for block, layer in zip(self.model.blocks, cache.layers, strict=True):
            x_BSD = block(x_BSD, context, layer)
        return self.model.tail(x_BSD)


def _set_weight_layout(model: Transfusion) -> None:
    """Store the weights of linear layers in the order in which their device multiplies fastest; same shapes.

    In float32 on a CPU by columns, where PyTorch's products of a few rows, as in decoding, are faster so.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            data = layer.weight.data
            by_columns = data.device.type == "cpu" and data.dtype == torch.float32
            layer.weight.data = data.t().contiguous().t() if by_columns else data.contiguous()
