# Copyright 2026 The diffusers-npu authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
How a scheduler takes the steps of a loop of which most are forecast.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .forecast import NoiseForecast


# Measured: the pictures come about as close to those of all steps as with DDIM.
_TAKES_FORECASTS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_PREDICTIONS = ("epsilon", "v_prediction")


class ForecastSolver:
    """
    Says which steps of `scheduler` are taken, and takes those of PNDM itself: its formula makes of the last four
    predictions a new one by factors of up to 59/24, and so of every small jump from a forecast to a prediction a large
    one. The same order of accuracy comes from the forecast for the middle of the step.

    Args:
        scheduler (`SchedulerMixin`):
            Its timesteps are set.
        times (sequence of `float`):
            The timesteps of all calls of the UNet.
        step_kwargs (`dict`):
            What its `step` gets beside; `eta` must be 0.

    Attributes:
        repeated (`frozenset[int]`):
            The steps that leave the latents as they are: PNDM's second one, which takes the first one again.
        calls (`list[int]`):
            The other ones.
        levels (`dict`, *optional*):
            See `NoiseForecast`.
        is_own (`bool`):
            Whether the steps are taken here.

    Raises:
        `ValueError`: for a scheduler that was not measured, or that adds noise.
    """

    def __init__(self, scheduler: Any, times: Sequence[float], step_kwargs: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._times = times
        names = [kind.__name__ for kind in type(scheduler).__mro__]
        self._check(names[0], names, step_kwargs)
        self.is_own = "PNDMScheduler" in names
        pairs = enumerate(zip(times, times[1:]))
        self.repeated = frozenset(step for step, (time, later) in pairs if self.is_own and time == later)
        self.calls = [step for step in range(len(times)) if step not in self.repeated]
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        self.levels = signal_and_noise(scheduler, times) if is_velocity else None

    def step(
        self, step: int, prediction: torch.Tensor, latents: torch.Tensor, forecast: NoiseForecast
    ) -> torch.Tensor:
        """The latents after `step`, for the guided prediction."""
        if step in self.repeated:
            return latents
        time = self._times[step]
        length = self._scheduler.config.num_train_timesteps // self._scheduler.num_inference_steps
        if step < len(self._times) - 1:  # beyond the last one, the line leads nowhere
            prediction = prediction + forecast.change(time, time - length / 2).to(prediction.dtype)
        return self._scheduler._get_prev_sample(latents, time, time - length, prediction)

    def _check(self, name: str, names: Sequence[str], step_kwargs: dict[str, Any]) -> None:
        config = self._scheduler.config
        if not any(known in names for known in _TAKES_FORECASTS):
            raise ValueError(f"`cache_forecast` is known to work with {', '.join(_TAKES_FORECASTS)}, not with {name}.")
        if config.prediction_type not in _PREDICTIONS:
            raise ValueError(f"`cache_forecast` needs a prediction of {_PREDICTIONS}, not {config.prediction_type!r}.")
        if step_kwargs.get("eta"):
            raise ValueError(f"`cache_forecast` needs `eta=0`, not {step_kwargs['eta']}: new noise cannot be forecast.")
        if str(config.get("algorithm_type", "")).startswith("sde"):
            raise ValueError(f"`cache_forecast` needs a solver without noise, not {config.algorithm_type!r}.")
        if not config.get("skip_prk_steps", True):
            raise ValueError("`cache_forecast` needs a PNDMScheduler with `skip_prk_steps=True`.")
        if config.get("timestep_type") == "continuous":
            raise ValueError("`cache_forecast` needs the timesteps of training, not `timestep_type='continuous'`.")
        if config.prediction_type == "v_prediction" and config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "`cache_forecast` forecasts the noise, of which a first sample without signal says nothing "
                "(`rescale_betas_zero_snr`): guidance would be lost in the steps after it."
            )


def signal_and_noise(scheduler: Any, times: Sequence[float]) -> dict[float, tuple[float, float]]:
    """What signal and noise are multiplied by in a UNet's sample; between timesteps of training, by their ratio."""
    products = scheduler.alphas_cumprod.cpu().double()
    ratios = ((1 - products) / products).sqrt().numpy()
    at = np.interp(times, np.arange(len(ratios)), ratios)
    signals = (1 + at**2) ** -0.5
    return dict(zip(times, zip(signals.tolist(), np.sqrt(1 - signals**2).tolist())))
