"""Norms behind the sublayers (Swin Transformer V2, Chameleon) in place of before them."""

import pytest
import torch

from megafusion.errors import UserError
from megafusion.hub.config import hub_config
from megafusion.model.config import ModelConfig
from megafusion.model.transformer import Block, block_context
from megafusion.sequence.intervals import Intervals

CONFIG = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "vocab_size": 8,
    "latent_channels": 1,
    "latent_downsampling": 1,
    "image_sizes": ((2, 2),),
    "patch_size": 1,
}


@pytest.mark.parametrize("post_norm", [True, False])
def test_a_block_normalizes_the_outputs_or_the_inputs_of_its_sublayers(post_norm):
    torch.manual_seed(0)
    config = ModelConfig(**CONFIG, post_norm=post_norm)
    block, x_BSD = Block(config), torch.randn(1, 5, 16)
    for norm in (block.attention_norm, block.feed_forward_norm):
        torch.nn.init.uniform_(norm.weight)
    end = torch.arange(1, 6, dtype=torch.int32)[None]
    context = block_context(config, Intervals(end, None, 5), end - 1, x_BSD.dtype, end < 0)
    expected = x_BSD
    for norm, sublayer in (
        (block.attention_norm, block.attention),
        (block.feed_forward_norm, block.feed_forward),
    ):
        added = norm(sublayer(expected, context)) if post_norm else sublayer(norm(expected), context)
        expected = expected + added
    torch.testing.assert_close(block(x_BSD, context), expected)


def test_no_text_model_of_transformers_has_it():
    with pytest.raises(UserError, match=r"no architecture of transformers .* has model.post_norm"):
        hub_config(ModelConfig(**CONFIG, post_norm=True), 8, {})
