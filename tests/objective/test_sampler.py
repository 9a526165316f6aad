"""Samplers at every number of steps: their timesteps, where each step ends, and the error that is left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.objective import ddpm, flow
from megafusion.objective.config import SamplingConfig
from megafusion.objective.ddpm import DDPMConfig, scheduler
from megafusion.objective.flow import FlowConfig

SAMPLERS = ("ddim", "dpm++")
NAMES = {DDPMConfig: ddpm.SAMPLERS, FlowConfig: flow.SAMPLERS}
STOCHASTIC = ("DDPM", "EulerAncestralDiscrete")
DETERMINISTIC = tuple(name for name in ddpm.SAMPLERS if name[0].isupper() and name not in STOCHASTIC)
"""Not the short names, which are others of these."""
OTHERS = ("UniPCMultistep", "LMSDiscrete")
"""The first is worse by 0.0001 where so few timesteps are parted unevenly; the second integrates slowly."""
SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")


def counts(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    """Timesteps in training, and a number of steps that they allow."""
    return st.integers(1, limit).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most)))


DEVIATIONS = torch.logspace(-1.3, 0.3, 16)
"""Standard deviations of the toy's independent Gaussian elements: fine detail to coarse, as an image has."""


def make_sampler(config: DDPMConfig | FlowConfig, sampler: str, steps: int):
    return config.build().sampler(SamplingConfig(sampler=sampler, num_inference_steps=steps))


def assert_timesteps(timesteps: list[int], most: int) -> None:
    """They begin at T - 1 and fall to T / n before the end, evenly but for rounding."""
    steps = len(timesteps)
    assert timesteps[0] == most - 1
    assert timesteps[-1] >= 0
    gaps = [before - after for before, after in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    assert all(most // steps <= gap <= -(-most // steps) for gap in gaps)


def test_n_steps_for_every_n_of_a_thousand():
    config = DDPMConfig(beta_schedule="linear")  # the quickest to make; all have the same timesteps
    for steps in range(1, 1001):
        timesteps = make_sampler(config, "ddim", steps).timesteps.tolist()
        assert len(timesteps) == steps
        assert_timesteps(timesteps, 1000)


@given(counts(1000), st.sampled_from(list(ddpm.SAMPLERS)), st.sampled_from(SCHEDULES))
def test_timesteps_are_diffusers_where_those_are_right(numbers, sampler, schedule):
    from diffusers import DDIMScheduler

    most, steps = numbers
    config = DDPMConfig(num_train_timesteps=most, beta_schedule=schedule)
    timesteps = make_sampler(config, sampler, steps).timesteps.tolist()
    assert len(timesteps) == steps
    assert_timesteps(timesteps, most)
    theirs = DDIMScheduler.from_config(scheduler(config).config, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    if len(theirs.timesteps) == steps:  # they round halves by floating-point chance
        assert all(abs(a - b) <= 1 for a, b in zip(timesteps, theirs.timesteps.tolist(), strict=True))
        assert most % steps or timesteps == theirs.timesteps.tolist()


@given(counts(40), st.sampled_from(SCHEDULES))
def test_a_ddim_step_ends_at_the_noise_where_the_next_begins(numbers, schedule):
    """The model knows image and noise, so each step must land on the next timestep's mixture of them."""
    most, steps = numbers
    config = DDPMConfig(num_train_timesteps=most, beta_schedule=schedule, prediction_type="v_prediction")
    sampler, process = make_sampler(config, "ddim", steps), config.build()
    image, noise = torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    for timestep, after in zip(sampler.timesteps, [*sampler.timesteps[1:], None], strict=True):
        t = timestep[None] / most
        noised, output = process.add_noise(image, noise, t), process.target(image, noise, t)
        found = sampler.step(output, timestep, noised).prev_sample
        expected = image if after is None else process.add_noise(image, noise, after[None] / most)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(
    counts(40),
    st.sampled_from([(kind, name) for kind, names in NAMES.items() for name in names]),
    st.booleans(),
)
def test_every_sampler_ends_at_the_image_of_a_model_that_knows_it(numbers, named, is_second):
    """And deterministic ones keep the noise too: each step ends where the next begins."""
    (most, steps), (kind, name) = numbers, named
    if kind is DDPMConfig:
        prediction = ("epsilon", "v_prediction")[is_second]
        config = DDPMConfig(num_train_timesteps=most, prediction_type=prediction)
    else:
        config = FlowConfig(prediction_type=("velocity", "sample")[is_second])
    sampler, process = make_sampler(config, name, steps), config.build()
    image, noise = torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    latents, generators = noise, [torch.Generator().manual_seed(1)]
    for step, (timestep, t) in enumerate(zip(sampler.timesteps, sampler.times, strict=True)):
        zero = process.add_noise(torch.zeros_like(image), torch.ones_like(image), t[None])
        mean = process.add_noise(image, torch.zeros_like(image), t[None])
        own_noise = (latents - mean) / zero
        if name not in STOCHASTIC and step and not (kind is FlowConfig and t > 0.99):
            torch.testing.assert_close(own_noise, noise, rtol=0, atol=5e-2)
        output = process.target(image, own_noise, t[None])
        torch.testing.assert_close(
            process.clean(output, latents, t[None]), image, rtol=0, atol=0.01 / (1.0001 - float(t))
        )
        latents = sampler.step(output, timestep, latents, generators).prev_sample
    torch.testing.assert_close(latents, image, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_reach_the_deviations_of_the_data(sampler):
    """The exact prediction for Gaussian data, 2,000 samples of each deviation; within 6 % at all steps."""
    config = DDPMConfig()
    alphas, deviation = scheduler(config).alphas_cumprod, DEVIATIONS.view(-1, 1, 1, 1)
    errors = []
    for steps in (3, 100, 1000):
        made = make_sampler(config, sampler, steps)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(DEVIATIONS))]
        x = torch.randn(len(DEVIATIONS), 1, 40, 50, generator=torch.Generator().manual_seed(99))
        for timestep in made.timesteps:
            alpha, sigma = alphas[timestep] ** 0.5, (1 - alphas[timestep]) ** 0.5
            noise = sigma * x / (alpha**2 * deviation**2 + sigma**2)
            x = made.step(noise, timestep, x, generators).prev_sample
        errors.append((x.std((1, 2, 3)) / DEVIATIONS - 1).abs().max().item())
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] < 0.06, errors


def sampling_error(config: DDPMConfig | FlowConfig, sampler: str, steps: int) -> float:
    """RMS distance from the exact solution, of the sampler with the exact prediction for Gaussian data.

    Of alpha x_0 + sigma noise, with x_0 of mean 0 and deviation s, the variance is alpha^2 s^2 + sigma^2; the
    mean of the noise at x is sigma x over it, and the flow of probability keeps x's quantile.
    """
    made, is_flow = make_sampler(config, sampler, steps), isinstance(config, FlowConfig)
    alphas = None if is_flow else scheduler(config).alphas_cumprod

    def coefficients(timestep):
        return (
            (1 - timestep / 1000, timestep / 1000)
            if is_flow
            else (alphas[timestep] ** 0.5, (1 - alphas[timestep]) ** 0.5)
        )

    x = torch.ones(16, 1, 1, 1)
    deviation = DEVIATIONS.view(-1, 1, 1, 1)
    alpha, sigma = coefficients(made.timesteps[0])
    expected = x * deviation / (alpha**2 * deviation**2 + sigma**2).sqrt()
    for timestep in made.timesteps:
        alpha, sigma = coefficients(timestep)
        variance = alpha**2 * deviation**2 + sigma**2
        noise, image = sigma * x / variance, alpha * deviation**2 * x / variance
        x = made.step(noise - image if is_flow else noise, timestep, x).prev_sample
    return (x - expected).square().mean().sqrt().item()


def assert_no_more_error(config: DDPMConfig | FlowConfig, sampler: str, counts: range) -> None:
    """The error does not rise by more than a hundredth of the step between two of a pixel's 256 values."""
    errors = [sampling_error(config, sampler, steps) for steps in counts]
    for steps, before, after in zip(counts[1:], errors[:-1], errors[1:], strict=True):
        assert after <= before + 8e-5, f"{sampler}: {after} with {steps} steps, {before} with one less"


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        *((DDPMConfig(num_train_timesteps=48), name) for name in DETERMINISTIC if name not in OTHERS),
        *(
            (FlowConfig(shift=shift), name)
            for shift in (1.0, 3.0)
            for name in flow.SAMPLERS
            if name[0].isupper()
        ),
    ],
)
def test_a_step_more_leaves_no_more_error(config, sampler):
    assert_no_more_error(config, sampler, range(1, 49))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(name, n) for name in DETERMINISTIC for n in (1, 25, 60, 61, 500) if name != "LMSDiscrete" or n < 60],
)
def test_a_step_more_leaves_no_more_error_of_a_thousand(sampler, schedule, steps):
    assert_no_more_error(DDPMConfig(beta_schedule=schedule), sampler, range(steps, steps + 2))


@given(st.integers(1, 3000), st.sampled_from(["euler", "heun"]), st.floats(0.25, 8))
def test_a_flow_has_n_even_steps_for_every_n(steps, sampler, shift):
    """Before the shift; Heun's method calls the model at the end of each step but the last, too."""
    timesteps = make_sampler(FlowConfig(shift=shift), sampler, steps).timesteps
    assert len(timesteps) == (steps if sampler == "euler" else 2 * steps - 1)
    t = timesteps.double().unique().flip(0) / 1000
    expected = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    torch.testing.assert_close(t / (shift - (shift - 1) * t), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full  # every count; the quick cases above are those that failed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_more_leaves_no_more_error_at_any_count_of_a_thousand(sampler):
    assert_no_more_error(DDPMConfig(), sampler, range(1, 1001))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_whose_signal_float32_cannot_hold_is_refused(sampler, schedule):
    """The longest that is taken samples finite values; one longer is refused where it would not."""
    config = DDPMConfig(num_train_timesteps=8000, beta_schedule=schedule, prediction_type="v_prediction")
    made = make_sampler(config, sampler, 3)
    x = torch.randn(4)
    for t in made.timesteps:
        x = made.step(x / 2, t, x).prev_sample
    assert x.isfinite().all()
    if schedule != "squaredcos_cap_v2":
        with pytest.raises(ValueError, match="holds no signal of the last timesteps; take at most 8000"):
            DDPMConfig(num_train_timesteps=8001, beta_schedule=schedule)
