"""A small VQModel, shards of its codes, and the keys of a model whose images are these."""

from pathlib import Path

import torch

from megafusion.images.autoencoder import encode
from tests.support.small import small_run

CODEBOOK_SIZE = 40
QUANTIZED_MODEL = {
    "vocab_size": 2048 + CODEBOOK_SIZE,
    "codebook_size": CODEBOOK_SIZE,
    "latent_channels": 0,
    "latent_downsampling": 8,
    "patch_size": 1,
    "post_norm": True,
    "qk_norm": True,
}
"""Keys of `model` in place of those of `small_run`: Chameleon's, with 4 x 4 codes for images of 32 pixels."""


def make_vq(folder: Path) -> Path:
    """A random VQModel with 4 x 4 codes of a codebook of 40 for images of 32 pixels."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        in_channels=192,
        out_channels=192,
        latent_channels=4,
        num_vq_embeddings=CODEBOOK_SIZE,
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    colors_N3HW = torch.rand(CODEBOOK_SIZE, 3, 1, 1) * 2 - 1 + 0.2 * torch.randn(CODEBOOK_SIZE, 3, 8, 8)
    with torch.no_grad():  # a vector for each of some colors
        latents_NC = encode(model, colors_N3HW).latents[:, :, 0, 0]
        model.quantize.embedding.weight.copy_(latents_NC)
    model.save_pretrained(folder)
    return folder


def quantized_run(shards: Path, vae: Path, out: Path) -> dict:
    """Plain values of `small_run` on codes."""
    values = small_run(shards, vae, out)
    values["model"] |= QUANTIZED_MODEL
    return values
