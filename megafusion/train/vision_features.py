"""Features of a frozen vision model of transformers at the patches of images: what REPA aligns with."""

import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megafusion.errors import UserError
from megafusion.model.config import Grid
from megafusion.objective.config import AlignmentConfig
from megafusion.storage import read_json

KEY = "objective.alignment.model"


def check_vision_model(config: AlignmentConfig) -> None:
    """Raise UserError for a folder that is no vision model's, or whose features have another size."""
    if find_spec("transformers") is None:
        raise UserError(f"{KEY}: needs transformers: pip install 'megafusion[hub]'")
    size = _key(config.model, "config.json", "hidden_size")
    _key(config.model, "config.json", "patch_size")
    for name in ("image_mean", "image_std"):
        _key(config.model, "preprocessor_config.json", name)
    if size != config.feature_size:
        raise UserError(
            f"objective.alignment.feature_size {config.feature_size}: the features of {config.model} have "
            f"{size} numbers (hidden_size of its config.json); set it to {size}"
        )


def _key(folder: Path, file: str, key: str) -> Any:
    if not (path := folder / file).is_file():
        raise UserError(
            f"{KEY} {folder}: no {file}; name a folder of a vision model with patches that transformers loads"
        )
    if key not in (values := read_json(path)):
        raise UserError(f"{KEY} {path}: no {key}; give a vision model with patches, such as DINOv2")
    return values[key]


class VisionFeatures:
    """Features of a vision model with patches, on a device and in a dtype, without gradients.

    Images are resized so that each of our patches is one of the model's: 256 x 256 pixels in 16 x 16 patches
    become 224 x 224 for patches of 14 pixels, as in REPA. Raises UserError for a model that does not give
    each patch of these grids its features.
    """

    def __init__(
        self, config: AlignmentConfig, grids: Sequence[Grid], device: torch.device, dtype: torch.dtype
    ):
        check_vision_model(config)
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(config.model, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{KEY} {config.model}: cannot be loaded by transformers ({error})") from error
        self._model, self._dtype = model.to(device, dtype).eval().requires_grad_(False), dtype
        # CLIP, SigLIP and ViT take images of their own size alone unless they are asked to interpolate.
        key = "interpolate_pos_encoding"
        self._options = {key: True} if key in inspect.signature(model.forward).parameters else {}
        self.size, self._patch = config.feature_size, _key(config.model, "config.json", "patch_size")
        mean, std = (
            torch.tensor(_key(config.model, "preprocessor_config.json", name), device=device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        self._mean, self._std = mean, std
        for grid in dict.fromkeys(grids):
            self._check(config, grid, device)

    def _check(self, config: AlignmentConfig, grid: Grid, device: torch.device) -> None:
        """Raise UserError unless the model takes an image of this grid and gives each patch its features."""
        num_patches, image = grid[0] * grid[1], torch.zeros(1, 3, *grid, device=device)
        way_out = "give a vision model with a token for each patch, such as DINOv2, CLIP's or SigLIP's"
        try:
            shape = tuple(self.at_patches(image, grid).shape)
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{KEY} {config.model}: fails on an image of {grid[0]} x {grid[1]} patches ({error}); "
                f"{way_out}"
            ) from error
        if shape != (1, num_patches, self.size):
            raise UserError(
                f"{KEY} {config.model}: gives features of shape {list(shape)} for an image of {grid[0]} x "
                f"{grid[1]} patches, not {[1, num_patches, self.size]}; {way_out}"
            )

    @torch.no_grad()
    def at_patches(self, pixels_N3HW: Tensor, grid: Grid) -> Tensor:
        """[N, 3, H, W] of 0 to 255 -> float32 [N, P, F], patches in raster order."""
        size = [patches * self._patch for patches in grid]
        resized = F.interpolate(pixels_N3HW.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        values = ((resized / 255 - self._mean) / self._std).to(self._dtype)
        hidden = self._model(pixel_values=values, **self._options).last_hidden_state
        return hidden[:, -grid[0] * grid[1] :].float()  # before them are the class token and registers
