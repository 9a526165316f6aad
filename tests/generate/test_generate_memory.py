"""Memory of many generations."""

import gc

import psutil
import pytest

from megafusion.objective.config import SamplingConfig
from tests.support.generation import make_pipeline


@pytest.mark.full
def test_memory_does_not_grow_over_a_thousand_generations(run_config, tokenizer, codec):
    """Of texts and images of unlike lengths, a tenth of them left in the middle."""
    pipeline, process = make_pipeline(run_config, tokenizer, codec, num_steps=2), psutil.Process()
    sampling = SamplingConfig(num_inference_steps=2, temperature=1.0, max_new_tokens=6, stop=["x"])
    used = []
    for number in range(1001):
        begin = ("image", "text", "free")[number % 3]
        stream = pipeline.stream([["apple " * (1 + number % 9)]], begin=begin, seed=number, sampling=sampling)
        for _event in stream:
            if number % 10 == 0:
                break
        del stream, _event
        if number in (300, 1000):
            gc.collect()
            used.append(process.memory_info().rss / 2**20)
    assert used[1] - used[0] < 10, used
