"""The autoencoder of a configuration, and its folder: diffusers' files, report and reconstructions."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, VQModel
from PIL import Image

from data_prep.vae.config import AutoencoderConfig, NetworkConfig
from megafusion.config import dump_config
from megafusion.errors import UserError
from megafusion.images.codec import WEIGHTS_NAME
from megafusion.images.codec_config import CONFIG_NAME
from megafusion.storage import new_folder, refuse_foreign

FILES = (CONFIG_NAME, WEIGHTS_NAME, "recipe.yaml", "report.json", "reconstructions.png")


def build_model(config: NetworkConfig) -> AutoencoderKL | VQModel:
    """A freshly initialized AutoencoderKL; a VQModel if the configuration has a codebook."""
    for channels in config.channels:
        if channels % config.norm_num_groups:
            raise UserError(
                f"network.channels {channels}: not divisible by network.norm_num_groups "
                f"{config.norm_num_groups}"
            )
    num_levels = len(config.channels)
    pixel_channels = 3 * config.unshuffle**2
    keys = {
        "in_channels": pixel_channels,
        "out_channels": pixel_channels,
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_attention,
        "scaling_factor": 1.0,
    }
    if config.codebook_size:
        return VQModel(**keys, num_vq_embeddings=config.codebook_size)
    return AutoencoderKL(**keys)


def check_output(out: Path, overwrite: bool) -> None:
    """UserError, before hours of training, for a folder that holds what writing would delete."""
    foreign = [p.name for p in out.iterdir() if p.name not in FILES] if out.is_dir() else []
    if foreign or (out.exists() and not out.is_dir()):
        raise UserError(f"out {out}: holds other files {foreign[:3] or ''}; name a new folder")
    refuse_foreign(out, CONFIG_NAME)
    if (out / CONFIG_NAME).is_file() and not overwrite:
        raise UserError(
            f"out {out}: holds an autoencoder; choose another, or set overwrite=true to replace it"
        )


def write_autoencoder(
    config: AutoencoderConfig, model: AutoencoderKL | VQModel, report: dict, sheet: Image.Image
) -> None:
    """Write the folder atomically; an earlier autoencoder is replaced."""
    check_output(config.out, config.overwrite)
    with new_folder(config.out, CONFIG_NAME) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        sheet.save(folder / "reconstructions.png", optimize=True)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors makes its files readable by their owner alone
