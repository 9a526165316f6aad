"""Tensors of safetensors, joined along their rows, into the chunks of any shard: what it needs alone."""

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megafusion.checkpoint.chunks import Chunks
from megafusion.checkpoint.safetensors_reader import SafetensorsWeights, open_safetensors
from megafusion.parallel.sharding import ShardSpan, ShardSpec


class Counted:
    """A lazy slice that counts the elements that are read."""

    read = 0

    def __init__(self, part):
        self.part = part

    def get_shape(self) -> list[int]:
        return self.part.get_shape()

    def __getitem__(self, index):
        values = self.part[index]
        Counted.read += values.numel()
        return values


@settings(max_examples=60)
@given(data=st.data())
def test_a_rank_reads_its_fragment_and_no_more(data, tmp_path_factory):
    rows = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "rows of each stored tensor")
    inner = data.draw(st.lists(st.integers(1, 4), max_size=2), "other dimensions")
    stored = [torch.randn(n, *inner) for n in rows]
    whole = torch.cat(stored)
    folder: Path = tmp_path_factory.mktemp("stored")
    save_file({str(i): part for i, part in enumerate(stored)}, folder / "model.safetensors")
    parts = [Counted(part) for _, part in sorted(open_safetensors(folder).items())]
    # A shard of two spans along a dimension, of which an optimizer holds some elements in a row.
    dim = data.draw(st.integers(0, whole.ndim - 1), "sharded dimension")
    size = whole.shape[dim]
    starts = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=2), "starts of spans"))
    spans, local = [], 0
    for start, stop in zip(starts, [*starts[1:], size], strict=True):
        length = data.draw(st.integers(1, stop - start), "length of a span")
        spans.append(ShardSpan(local, start, length))
        local += length
    spec = ShardSpec(whole.shape, dim, tuple(spans))
    shard = spec.shard(whole).flatten()
    start = data.draw(st.integers(0, len(shard)), "start of the fragment")
    stop = data.draw(st.integers(start, len(shard)), "end of the fragment")
    num_rows = data.draw(st.integers(1, len(whole)), "rows to fill")
    fragment = torch.full((stop - start,), torch.nan)
    expected = spec.shard(
        torch.where(torch.arange(len(whole)).view(-1, *[1] * len(inner)) < num_rows, whole, torch.nan)
    )
    chunks = Chunks(fragment, start, spec).first_rows(num_rows)
    Counted.read = 0
    SafetensorsWeights(folder, {"name": parts}).read({"name": chunks})
    torch.testing.assert_close(fragment, expected.flatten()[start:stop], rtol=0, atol=0, equal_nan=True)
    assert chunks.size() == (num_rows, *whole.shape[1:])
    assert Counted.read == int(fragment.isfinite().sum())
