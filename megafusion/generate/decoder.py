"""Forward passes over a key-value cache, for a batch of rows: prompts, one token each, or one image each."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megafusion.generate.cache import KVCache
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.objective.sampler import apply_guidance
from megafusion.sequence.packing import PackedBatch

ProgressCallback = Callable[[int, int], None]
"""Called after each denoising step with the number of steps done and their total."""


class Decoder:
    """Stem, blocks and tail of a model over a cache. No method computes gradients."""

    def __init__(self, model: Transfusion):
        self.model = model

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """An empty cache for this model."""
        return KVCache.empty(num_rows, capacity, self.model.config, like=self.model.tail.head.weight)

    @torch.no_grad()
    def read_prompts(self, cache: KVCache, batch: PackedBatch, lengths_B: Tensor) -> Tensor:
        """Prefill with prompts of texts and clean images; next-token logits [B, V].

        The batch holds one document per row from position 0; lengths_B int64 [B] are their lengths. Images
        have t = 0.
        """
        own = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        row_end = torch.where(own < lengths_B[:, None], batch.row_end, 0)
        timesteps = self.model.objective.noise_process.timesteps(batch.t)
        x_BSD, _ = self.model.stem(
            batch.tokens, batch.patch_index, batch.latents, timesteps, batch.image_size
        )
        hidden_BSD = self._forward(cache, x_BSD, row_end)
        cache.advance(lengths_B)
        last = (lengths_B - 1)[:, None, None].expand(-1, 1, hidden_BSD.shape[-1])
        return self.model.tail.head(hidden_BSD.gather(1, last))[:, 0]

    @torch.no_grad()
    def read_tokens(self, cache: KVCache, tokens_B: Tensor) -> Tensor:
        """Append one token to each row; next-token logits [B, V]."""
        x_BSD = self.model.stem.embedding(tokens_B[:, None])
        hidden_BSD = self._forward(cache, x_BSD, torch.ones_like(tokens_B)[:, None])
        cache.advance(torch.ones_like(tokens_B))
        return self.model.tail.head(hidden_BSD)[:, 0]

    @torch.no_grad()
    def draw(
        self,
        cache: KVCache,
        unconditional: KVCache,
        noise_BCHW: Tensor,
        sampling: SamplingConfig,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Denoise one image after each row's boi and append it, clean; returns latents [B, C, H, W].

        noise_BCHW: unit normal, float32, of the size that the boi tokens stand for, equal for all rows. The
        sampler's arithmetic keeps its dtype, whatever the model's.
        unconditional: rows of the unconditional prediction in classifier-free guidance, up to their boi.
        """
        sampler = self.model.objective.noise_process.sampler(sampling)
        is_guided = sampling.guidance_scale != 1
        both = cache.concatenate(unconditional) if is_guided else cache
        latents = noise_BCHW
        for step, timestep in enumerate(sampler.timesteps):
            prediction = self._predict(
                both, torch.cat([latents, latents]) if is_guided else latents, timestep
            )
            if is_guided:
                conditional, unconditioned = prediction.chunk(2)
                prediction = apply_guidance(conditional, unconditioned, sampling.guidance_scale)
            latents = sampler.step(prediction, timestep, latents).prev_sample
            if progress:
                progress(step + 1, len(sampler.timesteps))
        # Later tokens must attend to the clean image: its keys and values replace those of the noised one.
        self._predict(cache, latents, self.model.objective.noise_process.timesteps(torch.zeros(())))
        cache.advance(torch.full_like(cache.lengths, math.prod(self._grid(latents))))
        return latents

    def _predict(self, cache: KVCache, latents_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """The model's prediction, float32 [B, C, H, W], for noised latents after each row."""
        timesteps_B = timestep.expand(len(latents_BCHW)).to(latents_BCHW.device)
        dtype = self.model.tail.head.weight.dtype
        patches_BPD, skips = self.model.stem.adapter.encode(latents_BCHW.to(dtype), timesteps_B)
        end = torch.full(patches_BPD.shape[:2], patches_BPD.shape[1], device=latents_BCHW.device)
        hidden_BPD = self._forward(cache, patches_BPD, end)
        grid = self._grid(latents_BCHW)
        return self.model.tail.adapter.decode(hidden_BPD, timesteps_B, skips, grid).float()

    def _grid(self, latents_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = latents_BCHW.shape[2:]
        return height // self.model.config.patch_size, width // self.model.config.patch_size

    def _forward(self, cache: KVCache, x_BSD: Tensor, row_end_BS: Tensor) -> Tensor:
        positions, intervals = cache.allocate(row_end_BS)
        context = block_context(self.model.config, intervals, positions, x_BSD.dtype)
        for block, layer in zip(self.model.blocks, cache.layers, strict=True):
            x_BSD = block(x_BSD, context, layer)
        return self.model.tail(x_BSD)
