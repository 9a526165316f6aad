"""Forward FLOPs of each layer, by which pipeline stages are balanced (partition.py)."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megafusion.model.config import ModelConfig
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import SequenceShape


def layer_flops(config: ModelConfig, shape: SequenceShape) -> list[int]:
    """Forward FLOPs of the stem, of each block and of the tail for one row, counted by PyTorch.

    Counted on the meta device with dense attention: every pair of positions counts, masked or not.
    The stem and the tail include the U-Net and the vocabulary. Every image slot counts as one of the first
    size.
    """
    with torch.device("meta"):
        one_block = config.model_copy(
            update={
                "num_layers": 1,
                "attention": "sdpa",
                "image_sizes": config.image_sizes[:1],
                "modality_weights": "none",  # the same FLOPs
            }
        )
        model = Transfusion(one_block, ObjectiveConfig())
        tokens = torch.zeros(1, shape.length, dtype=torch.int64)
        bounds = torch.zeros(1, shape.length, dtype=torch.int32)
        latents = torch.zeros(1, shape.num_images, shape.latent_channels, *shape.sizes[0])
        timesteps = torch.zeros(1, shape.num_images, dtype=torch.int64)
        clean = (latents, timesteps) if shape.clean_context else None
    (x, skips), stem = _counted(model.stem, tokens, bounds, latents, timesteps, timesteps, clean)
    context = block_context(one_block, Intervals(bounds, bounds, shape.length), bounds, x.dtype, bounds > 0)
    hidden, block = _counted(model.blocks[0], x, context)
    _, head = _counted(model.tail.head, hidden)
    _, images = _counted(model.tail.images, hidden, timesteps, timesteps, skips, timesteps)
    return [stem, *[block] * config.num_layers, head + images]


def _counted(function, *arguments) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return result, counter.get_total_flops()
