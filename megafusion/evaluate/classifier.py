"""An image classifier that names the concept and style of a generated emoji.

It is independent of the generator: a small convolutional network embeds a 64 x 64 image, and the nearest of
the concepts' reference embeddings, by cosine, names it; an image near none of them is `other`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from megafusion.errors import UserError
from megafusion.evaluate.distortions import corrupt
from megafusion.storage import write_file

IMAGE_SIZE = 64
CHANNELS = (24, 48, 96, 128)
EMBEDDING_SIZE = 64
OTHER = "other"
"""Class of an image that shows none of the concepts."""
REJECTION_COSINE = 0.5
"""Minimum cosine to a reference for an image to be named after it."""
METADATA_KEY = "classifier"
"""A single key, because safetensors writes several in no fixed order, and files should be reproducible."""


class ImageClassifier(nn.Module):
    """Names images after the nearest of K references; metrics: measured when the weights were trained."""

    def __init__(self, keys: Sequence[str], metrics: dict[str, float] | None = None) -> None:
        super().__init__()
        self.keys = list(keys)
        self.metrics = metrics or {}
        layers: list[nn.Module] = []
        for num_in, num_out in zip((3, *CHANNELS), CHANNELS, strict=False):
            conv = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(8, num_out), nn.SiLU()]
        # 2 x 2 rather than global pooling: positions tell a face from its parts.
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.project = nn.Linear(4 * CHANNELS[-1], EMBEDDING_SIZE)
        # Trained with the network: each is the mean direction of one image's variants.
        self.references = nn.Parameter(torch.randn(len(keys), EMBEDDING_SIZE))

    @classmethod
    def load(cls, path: Path | str) -> "ImageClassifier":
        """Load weights that `save` wrote; UserError naming the file if it is invalid."""
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()[METADATA_KEY])
                classifier = cls(stored["keys"], stored["figures"])
                classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: not classifier weights: {error}; "
                "make them with python -m data_prep.emoji.train_classifier train"
            ) from error
        return classifier.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write weights, keys and metrics atomically."""
        stored = json.dumps({"keys": self.keys, "figures": self.metrics})
        write_file(path, save(self.state_dict(), {METADATA_KEY: stored}))

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Cosine to each reference, [N, K], of images [N, 3, 64, 64] in [0, 1]."""
        return self.embed(images_N3HW) @ F.normalize(self.references, dim=-1).T

    def embed(self, images_N3HW: Tensor) -> Tensor:
        """Embeddings of unit length, [N, 64], of images [N, 3, 64, 64] in [0, 1]."""
        return F.normalize(self.project(self.features(images_N3HW - 0.5)), dim=-1)

    @torch.no_grad()
    def classify(self, images_N3HW: Tensor) -> list[str]:
        """The key of each image of [N, 3, 64, 64] in [0, 1], or `other`."""
        if images_N3HW.ndim != 4 or images_N3HW.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(f"images of shape {tuple(images_N3HW.shape)}: resize them to [N, 3, 64, 64]")
        cosines, nearest = self(images_N3HW.float()).max(-1)
        found = zip(cosines.tolist(), nearest.tolist(), strict=True)
        return [self.keys[index] if cosine >= REJECTION_COSINE else OTHER for cosine, index in found]

    @torch.no_grad()
    def nearest(self, embeddings_ND: Tensor, keys: Sequence[str]) -> list[str]:
        """Of these keys the one whose reference is nearest to each embedding; never `other`."""
        references_KD = self.references[[self.keys.index(key) for key in keys]]
        cosines_NK = embeddings_ND @ F.normalize(references_KD, dim=-1).T
        return [keys[index] for index in cosines_NK.argmax(-1).tolist()]

    def accuracy(
        self, images_N3HW: Tensor, keys: Sequence[str], corruption: str = "clean", seed: int = 0
    ) -> float:
        """Fraction of the images classified as their own key under one of CORRUPTIONS."""
        found = self.classify(corrupt(images_N3HW, corruption, seed))
        return sum(a == b for a, b in zip(found, keys, strict=True)) / len(found)
