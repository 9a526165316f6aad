"""A block's gradients do not depend on what its backward pass recomputes."""

import copy

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn

from megafusion.model.config import LoraConfig, ModelConfig
from megafusion.model.lora import LoraLinear
from megafusion.model.transformer import Block, block_context
from megafusion.parallel.activation_checkpointing import checkpointed
from megafusion.sequence.intervals import Intervals

ROWS, LENGTH, WIDTH = 2, 5, 16

FORMS = {
    "plain": {},
    "biases": {"attention_bias": True, "qk_norm": True},
    "post_norm": {"attention_bias": True, "post_norm": True},
    "modality": {"attention_bias": True, "modality_weights": "all"},
    "lora": {"attention_bias": True},
}


def gradients(block: nn.Module, config: ModelConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, requires_grad=True)
    end = torch.arange(1, LENGTH + 1, dtype=torch.int32).expand(ROWS, -1)
    context = block_context(config, Intervals(end, None, LENGTH), end - 1, x_BSD.dtype, end % 2 == 0)
    return list(torch.autograd.grad(block(x_BSD, context).square().sum(), [x_BSD, *block.parameters()]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("linear", [nn.functional.linear, zero3_linear_wrap], ids=["torch", "zero3"])
def test_recomputation_changes_no_gradient(monkeypatch, form, recompute, linear):
    """Also with DeepSpeed's linear function, which ZeRO 3 puts in the place of torch's."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_heads=2,
        vocab_size=8,
        latent_channels=1,
        latent_downsampling=1,
        image_sizes=((2, 2),),
        patch_size=1,
        **FORMS[form],
    )
    block = Block(config)
    if form == "lora":
        block.attention.qkv = LoraLinear(block.attention.qkv, LoraConfig(rank=2))
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    monkeypatch.setattr(nn.functional, "linear", linear)
    expected = gradients(block, config)
    found = gradients(checkpointed(copy.deepcopy(block), recompute), config)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
