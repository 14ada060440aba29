"""The loss of a denoiser: what it is shown, what it should say, and how much each error counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


class Levels(NamedTuple):
    """Of each example how much of the latents and of the noise is in what the denoiser sees, and its error's weight.

    All float32 [count].
    """

    alpha: Tensor
    sigma: Tensor
    weight: Tensor


def levels(alphas_cumprod: Tensor, timesteps: Tensor, prediction: str, gamma: float | None) -> Levels:
    """The levels at `timesteps`, int64 [count], of a schedule [timesteps], all on the CPU."""
    chosen = alphas_cumprod.float()[timesteps]
    weight = torch.ones_like(chosen) if gamma is None else min_snr_weights(chosen, gamma, prediction)
    return Levels(chosen.sqrt(), (1 - chosen).sqrt(), weight)


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: str = "epsilon") -> Tensor:
    """Weights that keep nearly clean steps from drowning those that compose (min-SNR, arXiv:2303.09556, section 3.4).

    Args:
        alphas_cumprod: of each example, float32 [count].
        gamma: the signal-to-noise ratio beyond which steps do not count for more; the paper takes 5.
        prediction: one of `PREDICTIONS`.

    Returns:
        float32 [count]: min(SNR, gamma) over SNR for a noise error, over SNR + 1 for one of velocity. Without any
        signal, where SNR is 0, these are 1 and 0.
    """
    signal_to_noise = alphas_cumprod / (1 - alphas_cumprod)
    if prediction == "v_prediction":
        return signal_to_noise.clamp(max=gamma) / (signal_to_noise + 1)
    return (gamma / signal_to_noise).clamp(max=1)


def add_noise(latents: Tensor, noise: Tensor, at: Levels) -> Tensor:
    """What the denoiser sees, [count, channels, height, width]."""
    return _spread(at.alpha) * latents + _spread(at.sigma) * noise


def target(latents: Tensor, noise: Tensor, at: Levels, prediction: str) -> Tensor:
    """What it should say: the noise, or the velocity (arXiv:2202.00512, appendix D)."""
    if prediction == "v_prediction":
        return _spread(at.alpha) * noise - _spread(at.sigma) * latents
    return noise


def weighted_error(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """The mean squared error of each example times its weight, averaged, as a float32 scalar."""
    errors = (predicted.float() - wanted.float()).square().mean(dim=(1, 2, 3))
    return (errors * weight).mean()


def _spread(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
