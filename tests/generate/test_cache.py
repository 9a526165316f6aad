"""The cache grows when it is full, and what it gives does not depend on its capacity."""

import numpy as np
import pytest
import torch

from megafusion.generate.decoder import Decoder
from tests.support.generation import make_pipeline, prompt_batch


@pytest.mark.parametrize("capacity", [1, 3, 9])
def test_a_cache_that_grows_gives_what_a_large_one_gives(run_config, tokenizer, codec, capacity):
    pipeline = make_pipeline(run_config, tokenizer, codec, num_steps=2)
    decoder, found = Decoder(pipeline.model), []
    rows = [[np.array([5, 6, 7, 8])], [np.array([9])]]
    for size in (capacity, 200):
        cache = decoder.new_cache(2, size)
        logits = [decoder.read_prompts(cache, *prompt_batch(pipeline, rows))]
        logits += [decoder.read_tokens(cache, torch.tensor([20 + i, 40 + i])) for i in range(30)]
        found.append(torch.stack(logits))
        assert cache.lengths.tolist() == [35, 32]
        other = decoder.new_cache(1, 3 * size)
        assert cache.concatenate(other).capacity == max(cache.capacity, other.capacity) >= 3 * size
    torch.testing.assert_close(*found, rtol=0, atol=0)
