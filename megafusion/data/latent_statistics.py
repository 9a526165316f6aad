"""Statistics of stored latents: normalized, they should have about zero mean and unit standard deviation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megafusion.data.document_format import StoredDocument
from megafusion.data.manifest import Manifest
from megafusion.data.reader import ShardFolder

NUM_DOCUMENTS = 32
MAX_DEVIATION, MAX_MEAN = 2.0, 1.0
"""Beyond them, or below 1 / MAX_DEVIATION, the noise process hides images too early or hardly at all."""


class LatentStatistics(NamedTuple):
    """Mean and standard deviation of normalized latents, and the factors that would give 0 and 1."""

    mean: float
    deviation: float
    scaling_factor: float
    shift_factor: float

    @property
    def warning(self) -> str | None:
        """The fault of the statistics, if any, and the way out."""
        if 1 / MAX_DEVIATION <= self.deviation <= MAX_DEVIATION and abs(self.mean) <= MAX_MEAN:
            return None
        return (
            f"normalized latents have mean {self.mean:.3g} and standard deviation {self.deviation:.3g}, far "
            "from 0 and 1, so losses look good and images do not: in the autoencoder's config.json, set "
            f"scaling_factor to {self.scaling_factor:.4g} and shift_factor to {self.shift_factor:.4g}, and "
            "preprocess again"
        )


def spread_documents(shards: ShardFolder, number: int = NUM_DOCUMENTS) -> list[StoredDocument]:
    """Documents at equal distances."""
    number = min(number, len(shards))
    return [shards.read(len(shards) * index // number) for index in range(number)]


def latent_statistics(documents: Sequence[StoredDocument], manifest: Manifest) -> LatentStatistics | None:
    """Statistics of the latents of some documents as training samples them; None where they have none."""
    moments = [s.data.astype(np.float64) for d in documents for s in d.segments if s.kind == "moments"]
    if not moments:
        return None
    means = np.concatenate([mean.ravel() for mean, _ in moments])
    log_variances = np.concatenate([log_variance.ravel() for _, log_variance in moments])
    deviation = float(np.sqrt(means.var() + np.exp(log_variances).mean()))
    scale, shift = manifest.latent_scale, manifest.latent_shift
    mean = float(means.mean())
    return LatentStatistics((mean - shift) * scale, deviation * scale, 1 / max(deviation, 1e-9), mean)
