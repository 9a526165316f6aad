"""Images of a model with a codebook: its codes, sampled one after another."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megafusion.errors import UserError
from megafusion.generate.cache import KVCache
from megafusion.generate.decoder import Decoder, DenoisingStep, Guide
from megafusion.generate.text import choose_tokens, process_logits
from megafusion.model.config import Grid
from megafusion.objective.config import SamplingConfig
from megafusion.objective.sampler import apply_guidance


def sample_codes(
    decoder: Decoder,
    cache: KVCache,
    guides: Sequence[Guide],
    logits_BV: Tensor,
    grid: Grid,
    first_code: int,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
) -> Iterator[DenoisingStep]:
    """Sample one image after each row's boi, code by code in raster order, and append it.

    Nothing but the grid's number of codes can be sampled. logits_BV: next-token logits after the boi.
    first_code: the token id of code 0. Guides: classifier-free guidance on logits. generators: of each row.
    A step is a code; its latents are the codes int64 [B, h, w] so far, then zeros. The receiver may change
    the step's code. Raises UserError for a code beyond the codebook.
    """
    codebook_size, num_codes, num_rows = decoder.model.config.codebook_size, math.prod(grid), len(logits_BV)
    options = {"temperature": sampling.image_temperature, "top_p": sampling.image_top_p}
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # those are of texts
    sampling = sampling.model_copy(update=options | plain)
    uniform_BP = [torch.rand(num_codes, generator=g, device=g.device).tolist() for g in generators]
    everything, logits = cache, torch.cat([logits_BV, *(g.logits for g in guides if g.logits is not None)])
    for guide in guides:
        everything = everything.concatenate(guide.cache)
    codes_BP = torch.zeros(num_rows, num_codes, dtype=torch.int64, device=logits.device)
    for index in range(num_codes):
        own, *others = logits[:, first_code : first_code + codebook_size].float().chunk(1 + len(guides))
        for guide, other in zip(guides, others, strict=True):
            own = apply_guidance(own, other, guide.scale)
        uniform = [row[index] for row in uniform_BP]
        codes_BP[:, index] = choose_tokens(process_logits(own, sampling), sampling.temperature, uniform)
        codes = codes_BP.unflatten(1, grid)
        state = DenoisingStep(index + 1, num_codes, torch.tensor(index), codes, codes.clone)
        yield state
        codes_BP = state.latents.flatten(1).clone()  # a receiver may keep the step's
        if not 0 <= int(codes_BP[:, index].min()) <= int(codes_BP[:, index].max()) < codebook_size:
            raise UserError(
                f"callback_on_step_end: a code outside of 0 to {codebook_size - 1}, those of the codebook"
            )
        logits = decoder.read_tokens(everything, (codes_BP[:, index] + first_code).repeat(1 + len(guides)))
    if guides:
        rows = torch.arange(num_rows, device=logits.device)
        cache.assign(rows, everything.select(rows))
