"""Rectified flow: its path, its times, its losses and its samplers against their formulas."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megafusion.errors import UserError
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.objective.flow import MIN_DIVISOR, FlowConfig
from megafusion.objective.head import LanguageHead
from megafusion.objective.losses import Objective
from megafusion.sequence.packing import Targets

PREDICTIONS = ("velocity", "epsilon", "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_means_the_same_velocity(prediction):
    flow = FlowConfig(prediction_type=prediction).build()
    latents, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9, 0.94], dtype=torch.float64)
    noised = flow.add_noise(latents, noise, t)
    torch.testing.assert_close(noised[2], (latents[2] + noise[2]) / 2)
    torch.testing.assert_close(flow.velocity(flow.target(latents, noise, t), noised, t), noise - latents)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_squared_error_of_the_velocity(prediction):
    latents, noise, wrong = torch.randn(3, 1, 3, 2, 4, 4, dtype=torch.float64)
    t, start = torch.tensor([[0.2, 0.5, 0.9]]).double(), torch.tensor([[0, 4, 9]])
    objective = Objective(ObjectiveConfig(noise_process={"kind": "flow", "prediction_type": prediction}))
    flow, counts = objective.noise_process, (torch.tensor(1), torch.tensor(3))
    targets = Targets(
        *(torch.full((1, 3), -100), latents, noise, t, start >= 0, *counts, torch.zeros_like(start)),
        target_index=torch.zeros(0, dtype=torch.int64),
    )
    noised = flow.add_noise(latents, noise, t)
    error = flow.velocity(wrong, noised, t) - flow.velocity(flow.target(latents, noise, t), noised, t)
    image = objective(LanguageHead(4, 7), torch.randn(1, 3, 4), wrong, targets).image
    torch.testing.assert_close(image, (error**2).mean(), check_dtype=False)


def test_weights_are_bounded_where_a_prediction_says_nothing_of_the_velocity():
    t = torch.tensor([0.0, 0.5, 1 - 1e-7])
    for prediction, bounded in (("sample", 0), ("epsilon", 2)):
        weight = FlowConfig(prediction_type=prediction).build().loss_weight(t)
        assert weight[bounded] == pytest.approx(MIN_DIVISOR**-2)
        assert weight[1] == pytest.approx(4)


@given(
    st.sampled_from(["uniform", "logit_normal"]),
    st.floats(-2, 2),
    st.floats(0.2, 3),
    st.floats(0.25, 8),
    st.floats(1e-3, 1),
    st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_t_is_a_float32_below_its_limit(distribution, mean, std, shift, max_t, seed):
    config = FlowConfig(t_distribution=distribution, logit_mean=mean, logit_std=std, shift=shift)
    generator, other = np.random.default_rng(seed), np.random.default_rng(seed)
    t = config.build().sample_t(generator, max_t)
    other.random()
    assert generator.bit_generator.state == other.bit_generator.state
    assert 0 <= np.float32(t) < 1
    assert t <= max_t * (1 + 1e-6)


@pytest.mark.parametrize("max_t", [1.0, 0.4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_t_has_the_distribution_of_the_paper_cut_off_at_its_limit(shift, max_t):
    """logit(t) is normal before the shift (arXiv 2403.03206, section 3.1)."""
    config = FlowConfig(t_distribution="logit_normal", logit_mean=-0.3, logit_std=0.8, shift=shift)
    process, generator = config.build(), np.random.default_rng(0)
    found = np.array([process.sample_t(generator, max_t) for _ in range(4000)])
    free = 1 / (1 + np.exp(-(np.random.default_rng(1).normal(size=200_000) * 0.8 - 0.3)))
    free = shift * free / (1 + (shift - 1) * free)
    assert stats.ks_2samp(found, free[free < max_t]).pvalue > 0.001


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_follow_the_flow_of_a_normal_distribution(prediction, sampler, shift):
    """Data N(m, s^2): the exact prediction is known, and noise z ends at m + s z."""
    mean, std = 0.7, 0.3
    flow = FlowConfig(prediction_type=prediction, shift=shift).build()
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    errors = []
    for steps in (1, 2, 5, 10, 40, 160):
        run = flow.sampler(SamplingConfig(sampler=sampler, num_inference_steps=steps))
        assert len(run.timesteps) == (steps if sampler == "euler" else 2 * steps - 1)
        assert run.timesteps[0] == 1000
        assert run.timesteps[-1] > 0
        latents = noise.clone()
        for timestep in run.timesteps:
            t = (timestep / 1000).double()
            variance = (1 - t) ** 2 * std**2 + t**2
            gain = (1 - t) * std**2 / variance
            latents_0 = mean + gain * (latents - (1 - t) * mean)
            noise_0 = t / variance * (latents - (1 - t) * mean)
            exact = {"velocity": noise_0 - latents_0, "epsilon": noise_0, "sample": latents_0}[prediction]
            latents = run.step(exact, timestep, latents).prev_sample.double()
        errors.append((latents - (mean + std * noise)).abs().max().item())
    # At t near 1 the noise does not determine the velocity, so epsilon keeps an error there.
    floor = 0.025 if prediction == "epsilon" else 0
    assert all(after < max(before, floor) for before, after in pairwise(errors)), errors
    assert errors[-1] < max(floor, 0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("device", ["meta", *["cuda"] * torch.cuda.is_available()])
def test_latents_may_be_on_another_device_than_timesteps(prediction, sampler, device):
    """diffusers keeps timesteps on the CPU. Meta stands for CUDA: it refuses the same operations."""
    flow = FlowConfig(prediction_type=prediction).build()
    run = flow.sampler(SamplingConfig(sampler=sampler, num_inference_steps=3))
    latents = torch.zeros(2, 3, 4, 4, device=device)
    for timestep, t in zip(run.timesteps, run.times, strict=True):
        assert flow.clean(latents, latents, t).device == latents.device
        latents = run.step(latents, timestep, latents).prev_sample
    assert latents.device.type == device


def test_samplers_of_the_other_process_are_refused():
    with pytest.raises(UserError, match=r"sampler ddim does not sample .*kind flow; use one of euler, heun"):
        FlowConfig().build().sampler(SamplingConfig(sampler="ddim"))
    with pytest.raises(UserError, match=r"sampler heun does not sample .*kind ddpm; use one of ddim, dpm"):
        ObjectiveConfig().noise_process.build().sampler(SamplingConfig(sampler="heun"))
