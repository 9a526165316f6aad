"""A step with 32,000 words needs no memory for whole logits, and computes what it would with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megafusion.config import parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.objective.head import LanguageHead
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.sharding import shard_spec_of
from megafusion.sequence.document import Segment, flatten
from megafusion.sequence.packing import collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from tests.support.workers import run_workers

LENGTH, VOCABULARY = 4096, 32000
WHOLE_LOGITS = LENGTH * VOCABULARY * 4


class WholeLogits(LanguageHead):
    """Logits of all positions, and PyTorch's cross-entropy of them."""

    def forward(self, hidden_ND: Tensor, labels_R: Tensor, index_R: Tensor) -> Tensor:
        labels_N = torch.full((len(hidden_ND),), -100).index_copy(0, index_R, labels_R)
        return F.cross_entropy(super().forward(hidden_ND).float(), labels_N, reduction="sum")


def step(values: dict, is_whole: bool) -> tuple[float, int, dict]:
    """The text loss of a step, its peak of memory above what was there before, and each gradient's shard."""
    start_process_group()
    config = parse_config(RunConfig, values, "test")
    engine = build_engine(config, make_mesh(config.parallel))
    if is_whole:
        engine.stage.head.__class__ = WholeLogits
    tokens, tokenizer = np.random.default_rng(0), Tokenizer(Path("none"), "", VOCABULARY - 2, bos=1, eos=2)
    text = Segment("tokens", tokens.integers(3, VOCABULARY - 2, LENGTH - 2))
    batch = collate([pack_row([flatten([text], tokenizer, config.model.patches)], config.sequence_shape)])
    engine.forward_backward([batch])  # what is made once
    engine.clip_and_step(0.0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    engine.forward_backward([batch])
    peak = memory("VmHWM") - before
    gradients = {
        name: (shard_spec_of(parameter), parameter.grad.clone())
        for name, parameter in engine.stage.named_parameters()
        if parameter.grad is not None
    }
    engine.clip_and_step(0.0)
    return engine.consensus.losses[0].item(), peak, gradients


def memory(key: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


@pytest.mark.full
def test_peak_memory_loss_and_gradients_with_32000_words(run_values):
    values = {**run_values, "parallel": {"zero_stage": 0}}
    values["model"] |= {"vocab_size": VOCABULARY, "num_layers": 1}
    values["data"] |= {"sequence_length": LENGTH}
    values["train"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    ((loss, peak, whole),) = run_workers(step, 1, values, True)
    ((found, chunked_peak, gradients),) = run_workers(step, 1, values, False)
    print(f"peak {peak / 2**20:.0f} MiB with whole logits, {chunked_peak / 2**20:.0f} MiB in chunks")
    assert peak > WHOLE_LOGITS
    assert peak - chunked_peak > 0.8 * WHOLE_LOGITS
    halves = run_workers(step, 2, {**values, "parallel": {"zero_stage": 0, "tensor": 2}}, False)
    for each, _, shards in [(found, chunked_peak, gradients), *halves]:
        assert each == pytest.approx(loss, rel=1e-6)
        assert shards.keys() == whole.keys()
        for name, (spec, gradient) in shards.items():
            expected = spec.shard(whole[name][1])
            assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-12, name
