"""The loss against the formulas of diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from runners.training.objective import PREDICTIONS, add_noise, levels, min_snr_weights, target, weighted_error

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMESTEPS = torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_and_targets_are_the_schedulers(prediction: str) -> None:
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at = levels(SCHEDULE.alphas_cumprod, TIMESTEPS, prediction, None)
    torch.testing.assert_close(add_noise(latents, noise, at), SCHEDULE.add_noise(latents, noise, TIMESTEPS))
    wanted = noise if prediction == "epsilon" else SCHEDULE.get_velocity(latents, noise, TIMESTEPS)
    torch.testing.assert_close(target(latents, noise, at, prediction), wanted)
    assert torch.equal(at.weight, torch.ones(4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction: str) -> None:
    ratio = compute_snr(SCHEDULE, TIMESTEPS)
    wanted = ratio.clamp(max=5) / (ratio if prediction == "epsilon" else ratio + 1)
    made = levels(SCHEDULE.alphas_cumprod, TIMESTEPS, prediction, 5.0).weight
    torch.testing.assert_close(made, wanted)
    without_signal = min_snr_weights(torch.zeros(1), 5.0, prediction)
    assert without_signal.item() == (1 if prediction == "epsilon" else 0)


def test_each_example_counts_by_its_weight() -> None:
    predicted, wanted = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    assert weighted_error(predicted, wanted, torch.tensor([1.0, 0.5])).item() == (1 * 1 + 0.5 * 4) / 2
