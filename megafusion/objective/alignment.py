"""Alignment of hidden states with a vision model's features (REPA, Yu et al., arXiv 2410.06940)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.objective.config import AlignmentConfig

PROJECTION_SIZE = 2048
"""Size of the projection's hidden layers, as in REPA."""
ALIGNMENT = "alignment."
"""Beginning of the names of the projection's weights."""


class Alignment(nn.Module):
    """The projection of hidden states into a vision model's features, and how far it is from these.

    It is trained with the model, and no part of what a run publishes.
    """

    def __init__(self, hidden_size: int, config: AlignmentConfig):
        super().__init__()
        size = PROJECTION_SIZE
        hidden = nn.Linear(hidden_size, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU()
        self.layers = nn.Sequential(*hidden, nn.Linear(size, config.feature_size))

    def forward(self, hidden_NPD: Tensor, features_NPF: Tensor) -> Tensor:
        """1 less the mean cosine similarity over an image's patches, float32 [N].

        Patches without features, which are zeros, do not count; nor does an image of them alone: 0.
        """
        has_features_NP = (features_NPF != 0).any(-1)
        similarity_NP = F.cosine_similarity(self.layers(hidden_NPD).float(), features_NPF, dim=-1)
        errors_NP = torch.where(has_features_NP, 1 - similarity_NP, 0)
        return errors_NP.sum(-1) / has_features_NP.sum(-1).clamp(min=1)
