"""The AutoencoderKL of a configuration."""

from diffusers import AutoencoderKL

from data_prep.vae.config import NetworkConfig
from megafusion.errors import UserError


def build_model(config: NetworkConfig) -> AutoencoderKL:
    """A freshly initialized AutoencoderKL."""
    for channels in config.channels:
        if channels % config.norm_num_groups:
            raise UserError(
                f"network.channels {channels}: not divisible by network.norm_num_groups "
                f"{config.norm_num_groups}"
            )
    num_levels = len(config.channels)
    pixel_channels = 3 * config.unshuffle**2
    return AutoencoderKL(
        in_channels=pixel_channels,
        out_channels=pixel_channels,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        scaling_factor=1.0,
    )
