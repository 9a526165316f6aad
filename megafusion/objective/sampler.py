"""The reverse of a noise process: diffusers' schedulers as generation calls them, and guidance."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SamplerOptions = Mapping[str, Any]
"""Arguments of a diffusers scheduler; `scheduler` is its class's name without Scheduler."""
LEFT_OUT = (
    *("HeunDiscrete", "PNDM", "KDPM2Discrete", "KDPM2AncestralDiscrete", "SASolver", "DPMSolverSinglestep"),
    *("LCM", "TCD", "EDMEuler", "EDMDPMSolverMultistep"),
)
"""diffusers' schedulers that sample no process here, for the reasons at `ddpm.SAMPLERS`."""
MIN_SIGMA = 1e-4
"""Noise after the last step of schedulers whose arithmetic does not reach 0; it is far from visible."""


class SamplerStep(NamedTuple):
    """The latents after a step."""

    prev_sample: Tensor


class Sampler:
    """A diffusers scheduler with its timesteps set.

    The latents before each step are the model's input there, unit normal noise at the first: the state of
    schedulers that keep x_0 + sigma noise is scaled. So is a model's prediction turned into the scheduler's,
    by `convert(prediction, latents, timestep)`.
    timesteps: the timestep embedding's input at each step. times: t at each step, in [0, 1].
    """

    def __init__(
        self,
        scheduler: Any,
        timesteps: Tensor,
        times: Tensor,
        convert: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda prediction, *_: prediction,
    ):
        self.timesteps, self.times = timesteps, times
        self._scheduler, self._convert, self._index = scheduler, convert, 0
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latents: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> SamplerStep:
        """The next step, at `timestep`. generators: one for each image, for stochastic samplers."""
        own = self._scheduler.timesteps
        arguments = (self._convert(prediction, latents, timestep), own[self._index], latents / self._scale())
        noise = {"generator": list(generators)} if self._takes_generator and generators else {}
        state = self._scheduler.step(*arguments, **noise).prev_sample
        self._index += 1
        return SamplerStep(state * self._scale() if self._index < len(own) else state)

    def _scale(self) -> Tensor | float:
        """The factor of the scheduler's state before the model sees it."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return 1.0
        import torch

        return self._scheduler.scale_model_input(torch.ones(()), self._scheduler.timesteps[self._index])


def make_scheduler(options: SamplerOptions, **more: Any) -> Any:
    """A diffusers scheduler from those of the arguments that it takes."""
    import diffusers

    kind = getattr(diffusers, f"{options['scheduler']}Scheduler")
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in {**more, **options}.items() if name in taken})


def end_at_data(scheduler: Any) -> None:
    """Let the last step of a scheduler end at data where diffusers' ends at the least noise of training."""
    if (sigmas := getattr(scheduler, "sigmas", None)) is not None and sigmas[-1] > 0:
        sigmas[-1] = MIN_SIGMA


def unsupported_sampler(name: str | None, samplers: Mapping[str, SamplerOptions], kind: str) -> str | None:
    """Why a noise process has no such sampler, and which it has, the nearest first; None where it has."""
    if name is None or name in samplers:
        return None
    by_lower = {each.lower(): each for each in samplers}
    near = difflib.get_close_matches(name.lower(), by_lower, 1, 0.6)
    hint = f"did you mean {by_lower[near[0]]!r}? It has" if near else "use one of"
    if name in LEFT_OUT:
        hint = "it draws worse or is for other models (docs/python-api.md): use one of"
    return (
        f"sampling.sampler {name} does not sample objective.noise_process.kind {kind}; {hint} "
        f"{', '.join(samplers)}"
    )


def apply_guidance(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional) (Ho and Salimans, arXiv 2207.12598)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Move each image's deviation towards the conditional prediction's (Lin et al., arXiv 2305.08891)."""
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * factor + 1 - rescale)
