"""Noise and losses against diffusers' schedulers and against the formulas written out."""

import pytest
import torch

from megafusion.objective.losses import ObjectiveConfig, image_loss, text_loss, total_loss
from megafusion.objective.schedule import NoiseSchedule, ScheduleConfig


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
def test_noise_and_velocity_equal_diffusers(beta_schedule):
    config = ScheduleConfig(beta_schedule=beta_schedule, prediction="v_prediction")
    schedule, scheduler = NoiseSchedule(config), config.scheduler()
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        schedule.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps)
    )


def test_cosine_schedule_of_the_paper():
    """a_t = cos^2((t/T + s) / (1 + s) pi/2) over its value at 0 (Nichol and Dhariwal, arXiv 2102.09672)."""
    schedule = NoiseSchedule(ScheduleConfig())
    t = torch.arange(1, 901) / 1000
    alphas = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    torch.testing.assert_close(schedule.signal[:900] ** 2, alphas / start, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        schedule.target(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([5])),
        torch.ones(1, 1, 1, 1),
    )


def test_losses_are_means_over_the_global_counts():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    picked = logits.log_softmax(-1)
    expected = -(picked[0, 0, 1] + picked[0, 2, 4] + picked[1, 2, 0]) / 10
    torch.testing.assert_close(text_loss(logits, labels, torch.tensor(10)), expected)
    prediction, target = torch.randn(2, 2, 2, 3, 4, 4)
    used = torch.tensor([[True, False], [True, True]])
    errors = ((prediction - target) ** 2).mean((2, 3, 4))
    expected = (errors[0, 0] + errors[1, 0] + errors[1, 1]) / 6
    torch.testing.assert_close(image_loss(prediction, target, used, torch.tensor(6)), expected)


def test_total_weighs_images_five_times():
    losses = total_loss(torch.tensor(2.0), torch.tensor(3.0), ObjectiveConfig())
    assert losses.total == 17
