"""The noise process: how latents are noised in training, and which sampler runs the same process backwards.

Another process is one file beside ddpm.py and flow.py, and its config in `NoiseProcessConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Discriminator, Tag

from megafusion.objective.ddpm import DDPMConfig
from megafusion.objective.flow import FlowConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from megafusion.objective.config import SamplingConfig
    from megafusion.objective.sampler import Sampler, SamplerOptions


def _kind(value: Any) -> str:
    """Configurations without `kind` are DDPM's."""
    return value.get("kind", "ddpm") if isinstance(value, dict) else value.kind


NoiseProcessConfig = Annotated[
    Annotated[DDPMConfig, Tag("ddpm")] | Annotated[FlowConfig, Tag("flow")], Discriminator(_kind)
]
"""Configs of every process, each with a `kind` of its own; its `build` makes the `NoiseProcess`."""


class NoiseProcess(Protocol):
    """A path from latents at t = 0 to unit normal noise at t = 1; t is a float32 in [0, 1) everywhere.

    Small and picklable: workers that read data sample from it without loading diffusers.
    """

    @property
    def samplers(self) -> Mapping[str, SamplerOptions]:
        """Those of the process, by the names of `sampling.sampler`."""

    def sample_t(self, generator: np.random.Generator, max_t: float) -> float:
        """A random t below max_t for one image in training."""

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised latents [..., C, H, W] at times [...]."""

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The prediction [..., C, H, W] that the loss asks of the model."""

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Weight of each image's squared error at times [...]; None for 1."""

    def timesteps(self, t: Tensor) -> Tensor:
        """The timestep embedding's input at times [...], in the unit of `Sampler.timesteps`."""

    def clean(self, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The x_0 that a prediction at noised latents [..., C, H, W] and times [...] means."""

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """A sampler with its timesteps set. Raises UserError where `unsupported_reason` gives a reason."""

    def unsupported_reason(self, sampling: SamplingConfig) -> str | None:
        """Why the process has no such sampler; None where it has."""
