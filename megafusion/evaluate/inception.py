"""torch-fidelity's InceptionV3 with weights that the user gives: the features of FID and KID."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from megafusion.errors import UserError

WHERE_FROM = (
    "fetch weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0 "
    "(github.com/toshas/torch-fidelity/releases), and give inception=FILE"
)


def load_inception(path: Path) -> nn.Module:
    """The network: uint8 images [N, 3, H, W] to a tuple of features [N, 2048]. UserError for other weights.

    Weights are read as tensors alone: no pickle of the user's is run.
    """
    weights = _read(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"inception: needs torch-fidelity, and torchvision of the same build as torch; "
            f"pip install 'megafusion[eval]' ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles the file that it is given, so it is given one of ours.
        checked = Path(folder) / "inception.pth"
        torch.save(weights, checked)
        try:
            return FeatureExtractorInceptionV3("inception", ["2048"], str(checked))
        except RuntimeError as error:
            raise UserError(
                f"{path}: not the weights of torch-fidelity's InceptionV3; {WHERE_FROM}"
            ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"inception: {path}: no such file; {WHERE_FROM}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types
        kind = type(error).__name__
        raise UserError(f"inception: {path}: not readable as tensors alone ({kind}); {WHERE_FROM}") from error
    if not isinstance(weights, dict):
        raise UserError(f"inception: {path}: not a dictionary of weights; {WHERE_FROM}")
    return weights
