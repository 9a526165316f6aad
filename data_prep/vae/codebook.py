"""A codebook's vectors that nothing uses, started anew (Jukebox's random restarts, arXiv 2005.00341)."""

import torch
from diffusers import VQModel
from torch import Tensor, nn

from megafusion.images.autoencoder import Quantized

RESTART_EVERY = 100
"""Steps between restarts; the first step starts every vector."""


class CodebookRestarts(nn.Module):
    """Counts how often each vector is used, and moves unused ones to latents of the encoder.

    Without it most vectors stay where they began, far from all latents. The counts are state that a
    checkpoint holds.
    """

    uses: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("uses", torch.zeros(codebook_size, dtype=torch.int64))

    @torch.no_grad()
    def update(self, step: int, found: Quantized, models: list[VQModel]) -> None:
        """Count a step's codes; where it is due, restart the vectors of each model that none was since."""
        codes = found.codes.flatten()
        self.uses += codes.bincount(minlength=len(self.uses))
        if step != 1 and step % RESTART_EVERY:
            return
        unused = torch.ones_like(self.uses, dtype=torch.bool) if step == 1 else self.uses == 0
        latents_TC = found.latents.detach().movedim(1, -1).flatten(0, 2).float()
        chosen = torch.randint(len(latents_TC), (int(unused.sum()),), device=latents_TC.device)
        for model in models:
            model.quantize.embedding.weight[unused] = latents_TC[chosen]
        self.uses.zero_()
