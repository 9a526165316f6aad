"""Noise and losses against diffusers' schedulers and against the formulas written out."""

import pytest
import torch

from megafusion.objective.config import ObjectiveConfig, ScheduleConfig
from megafusion.objective.losses import Objective
from megafusion.objective.noise_process import NoiseSchedule, ddpm_scheduler
from megafusion.sequence.packing import Targets


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
def test_noise_and_velocity_equal_diffusers(beta_schedule):
    config = ScheduleConfig(beta_schedule=beta_schedule, prediction="v_prediction")
    schedule, scheduler = NoiseSchedule(config), ddpm_scheduler(config)
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
    text = -(picked[0, 0, 1] + picked[0, 2, 4] + picked[1, 2, 0]) / 10
    prediction, latents, noise = torch.randn(3, 2, 2, 3, 4, 4)
    errors = ((prediction - noise) ** 2).mean((2, 3, 4))
    image = (errors[0, 0] + errors[1, 0] + errors[1, 1]) / 6
    timesteps, start = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[3, -1], [0, 7]])
    counts = torch.tensor(10), torch.tensor(6)
    targets = Targets(labels, latents, noise, timesteps, start, *counts, torch.zeros_like(start))
    losses = Objective(ObjectiveConfig())(logits, prediction, targets)
    torch.testing.assert_close(losses.text, text)
    torch.testing.assert_close(losses.image, image)
    torch.testing.assert_close(losses.total, text + 5 * image)
    weighed = Objective(ObjectiveConfig(image_weight=0.5))(logits, prediction, targets)
    torch.testing.assert_close(weighed.total, text + 0.5 * image)


def test_an_image_of_any_size_weighs_as_another():
    """The mean over its own elements; at the top left of what holds the largest height and width."""
    sizes = ((4, 4), (2, 6))
    latents, noise, prediction = torch.zeros(3, 1, 2, 3, 4, 6)
    errors = []
    for slot, (height, width) in enumerate(sizes):
        for tensor in (latents, noise, prediction):
            tensor[0, slot, :, :height, :width] = torch.randn(3, height, width)
        error = prediction[0, slot, :, :height, :width] - noise[0, slot, :, :height, :width]
        errors.append((error**2).mean())
    start = torch.tensor([[3, 9]])
    labels, counts = torch.full((1, 3), -100), (torch.tensor(1), torch.tensor(4))
    targets = Targets(labels, latents, noise, start * 0, start, *counts, torch.tensor([[0, 1]]))
    losses = Objective(ObjectiveConfig(), sizes)(torch.randn(1, 3, 7), prediction, targets)
    torch.testing.assert_close(losses.image, sum(errors) / 4)


def test_a_batch_without_targets_has_no_loss():
    targets = Targets(
        torch.full((1, 3), -100),
        *torch.randn(2, 1, 1, 2, 2, 2),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([[-1]]),
        torch.tensor(0),
        torch.tensor(0),
        torch.zeros(1, 1, dtype=torch.int64),
    )
    logits, prediction = (
        torch.randn(1, 3, 7, requires_grad=True),
        torch.randn(1, 1, 2, 2, 2, requires_grad=True),
    )
    losses = Objective(ObjectiveConfig())(logits, prediction, targets)
    losses.total.backward()
    assert losses == (0, 0, 0)
    assert not logits.grad.any()
    assert not prediction.grad.any()
