"""Noise process and losses against diffusers' schedulers and the papers' formulas."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from megafusion.errors import UserError
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.objective.ddpm import DDPMConfig, scheduler
from megafusion.objective.head import LanguageHead
from megafusion.objective.losses import Objective
from megafusion.sequence.packing import Targets, target_index


def head_of_itself(num_tokens: int) -> LanguageHead:
    """A head whose logits are the hidden states."""
    head = LanguageHead(num_tokens, num_tokens)
    head.weight.data = torch.eye(num_tokens)
    return head


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
def test_noise_and_velocity_equal_diffusers(beta_schedule):
    config = DDPMConfig(beta_schedule=beta_schedule, prediction_type="v_prediction")
    process, expected = config.build(), scheduler(config)
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    t = timesteps / 1000
    torch.testing.assert_close(
        process.add_noise(latents, noise, t), expected.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        process.target(latents, noise, t), expected.get_velocity(latents, noise, timesteps)
    )


def test_cosine_schedule_of_the_paper():
    """a_t = cos^2((t + s) / (1 + s) pi/2) over its value at 0 (Nichol and Dhariwal, arXiv 2102.09672)."""
    process = DDPMConfig().build()
    t, one, zero = torch.arange(900) / 1000, torch.ones(1), torch.zeros(1)
    alphas = torch.cos((t + 0.001 + 0.008) / 1.008 * torch.pi / 2) ** 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    signal = process.add_noise(one, zero, t).flatten()
    torch.testing.assert_close(signal**2, alphas / start, rtol=1e-3, atol=1e-4)
    assert torch.equal(process.target(zero, one, torch.tensor([0.005])), one)


@pytest.mark.parametrize("num_timesteps", [1, 7, 49, 1000, 4096, 1_000_000])
def test_float32_t_names_each_timestep_exactly(num_timesteps):
    process = DDPMConfig(num_train_timesteps=num_timesteps).build()
    index = np.arange(num_timesteps)
    t = torch.from_numpy((index / num_timesteps).astype(np.float32))
    assert np.array_equal(process.timesteps(t).numpy(), index)
    assert t.min() >= 0
    assert t.max() < 1


@pytest.mark.parametrize(("max_t", "bound"), [(1.0, 1000), (0.5, 500), (0.01, 10), (0.0001, 1)])
def test_sampled_t_is_below_its_limit_and_takes_one_integer_of_the_generator(max_t, bound):
    process, generator, same = DDPMConfig().build(), np.random.default_rng(0), np.random.default_rng(0)
    sampled = [process.sample_t(generator, max_t) for _ in range(2000)]
    assert sampled == [int(same.integers(bound)) / 1000 for _ in range(2000)]
    assert max(sampled) < max(max_t, 0.001)


def test_a_process_samples_t_without_loading_diffusers():
    """Workers that read data start in the time of torch alone."""
    code = (
        "import pickle, sys, numpy\n"
        "from megafusion.objective.losses import ObjectiveConfig\n"
        "process = pickle.loads(pickle.dumps(ObjectiveConfig().noise_process.build()))\n"
        "process.sample_t(numpy.random.default_rng(0), 0.5)\n"
        "print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_more_steps_than_in_training_are_refused():
    process = DDPMConfig(num_train_timesteps=10).build()
    with pytest.raises(UserError, match=r"num_inference_steps 11 exceeds the 10 timesteps of training"):
        process.sampler(SamplingConfig(num_inference_steps=11))


def test_losses_are_means_over_the_global_counts():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    picked = logits.log_softmax(-1)
    text = -(picked[0, 0, 1] + picked[0, 2, 4] + picked[1, 2, 0]) / 10
    prediction, latents, noise = torch.randn(3, 2, 2, 3, 4, 4)
    errors = ((prediction - noise) ** 2).mean((2, 3, 4))
    image = (errors[0, 0] + errors[1, 0] + errors[1, 1]) / 6
    t, start = torch.zeros(2, 2), torch.tensor([[3, -1], [0, 7]])
    counts = torch.tensor(10), torch.tensor(6)
    size, index = torch.zeros_like(start), target_index(labels)
    targets, head = Targets(labels, latents, noise, t, start >= 0, *counts, size, index), head_of_itself(7)
    losses = Objective(ObjectiveConfig())(head, logits, prediction, targets)
    torch.testing.assert_close(losses.text, text)
    torch.testing.assert_close(losses.image, image)
    torch.testing.assert_close(losses.total, text + 5 * image)
    weighed = Objective(ObjectiveConfig(image_weight=0.5))(head, logits, prediction, targets)
    torch.testing.assert_close(weighed.total, text + 0.5 * image)


def test_images_of_every_size_have_equal_weight():
    """Each loss is the mean over the image's own elements, at the top left of the bounding size."""
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
    t, size, index = torch.zeros(1, 2), torch.tensor([[0, 1]]), target_index(labels)
    targets = Targets(labels, latents, noise, t, start >= 0, *counts, size, index)
    losses = Objective(ObjectiveConfig(), sizes)(head_of_itself(7), torch.randn(1, 3, 7), prediction, targets)
    torch.testing.assert_close(losses.image, sum(errors) / 4)


def test_a_batch_without_targets_has_no_loss():
    targets = Targets(
        torch.full((1, 3), -100),
        *torch.randn(2, 1, 1, 2, 2, 2),
        torch.zeros(1, 1),
        torch.tensor([[False]]),
        torch.tensor(0),
        torch.tensor(0),
        torch.zeros(1, 1, dtype=torch.int64),
        target_index(torch.full((1, 3), -100)),
    )
    logits, prediction = (
        torch.randn(1, 3, 7, requires_grad=True),
        torch.randn(1, 1, 2, 2, 2, requires_grad=True),
    )
    head = head_of_itself(7)
    losses = Objective(ObjectiveConfig())(head, logits, prediction, targets)
    losses.total.backward()
    assert losses == (0, 0, 0, 0)
    assert not logits.grad.any()
    assert not head.weight.grad.any()
    assert not prediction.grad.any()
