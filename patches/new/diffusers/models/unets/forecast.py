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
What a UNet would give in a denoising step, forecast from the steps that ran it whole.

A line through the last two values, as of [TaylorSeer](https://huggingface.co/papers/2503.06923) in its first order, is
a good forecast late in a picture and a bad one early, the earlier the stronger the guidance is. So each line is damped
by the factor that would have made the last forecast of this picture best.
"""

import torch


MOST_DAMPING = 1.5


class Forecast:
    """
    A damped line through the last two values of a quantity of shape `[batch, ...]`, over the timestep. Each row of the
    batch has a damping of its own, so that a picture does not depend on those beside it. Until three values are known,
    the damping is 0 and the forecast is the last value. All is done on the device of the values, without waiting for it.
    """

    def __init__(self) -> None:
        self._time = self._span = 0.0
        self._last: torch.Tensor | None = None
        self._change: torch.Tensor | None = None  # of the last two values, over `_span`
        self._damping: torch.Tensor | None = None

    def push(self, time: float, value: torch.Tensor) -> None:
        """Takes the `value` that the quantity has at `time`, or in the place of the last one if that was of this time."""
        if self._last is not None and time != self._time:
            if self._change is not None:
                self._damping = _fit(value - self._last, self._change) * (self._span / (time - self._time))
                self._damping = self._damping.clamp(0, MOST_DAMPING)
            self._change = value - self._last
            self._span = time - self._time
        self._time, self._last = time, value

    def at(self, time: float) -> torch.Tensor:
        """The forecast for `time`, in the dtype of the values."""
        if self._damping is None:
            return self._last
        factor = self._damping * ((time - self._time) / self._span)
        return torch.addcmul(self._last, factor.to(self._last.dtype), self._change)


def _fit(value: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """The factor of `line` that comes closest to `value`, for each row; 0 where the line is flat."""
    dimensions = tuple(range(1, value.dim()))
    value, line = value.float(), line.float()  # a sum of squares leaves float16
    product = (value * line).sum(dimensions, keepdim=True)
    norm = line.square().sum(dimensions, keepdim=True)
    return torch.where(norm > 0, product / norm, 0)


class NoiseForecast:
    """
    Forecasts the prediction of a guided UNet: the noise that guidance makes of its branches, and their difference.

    Args:
        guidance_scale (`float`, *optional*):
            None without guidance, where a prediction has no unconditional branch.
        levels (`dict`, *optional*):
            By the timestep, what signal and noise are multiplied by in the UNet's sample, if it predicts their velocity
            and not the noise.
    """

    def __init__(self, guidance_scale: float | None, levels: dict[float, tuple[float, float]] | None = None) -> None:
        self.guidance_scale = guidance_scale
        self._levels = levels
        self._noise = Forecast()
        self._difference = Forecast()
        self._error: torch.Tensor | float = 0.0  # of the last forecast, as found by a shallow step

    def full(self, time: float, sample: torch.Tensor, prediction: torch.Tensor) -> None:
        """Takes the `prediction` of all branches for `sample`, both `[branches * batch, ...]`."""
        noise = self._to_noise(time, sample, prediction)
        if self.guidance_scale is not None:
            unconditional, conditional = noise.chunk(2)
            self._difference.push(time, conditional - unconditional)
            noise = unconditional + self.guidance_scale * (conditional - unconditional)
        self._noise.push(time, noise)
        self._error = 0.0

    def shallow(self, time: float, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The prediction of all branches from that of the conditional one, `[batch, ...]`, for the whole `sample`."""
        if self.guidance_scale is None:
            self._error = self._to_noise(time, sample, prediction) - self._noise.at(time)
            return prediction
        unconditional_sample, conditional_sample = sample.chunk(2)
        conditional = self._to_noise(time, conditional_sample, prediction)
        difference = self._difference.at(time)
        self._error = conditional + (self.guidance_scale - 1) * difference - self._noise.at(time)
        unconditional = self._from_noise(time, unconditional_sample, conditional - difference)
        return torch.cat([unconditional, prediction])

    def skip(self, time: float, sample: torch.Tensor) -> torch.Tensor:
        """The prediction of all branches without the UNet."""
        noise = self._noise.at(time) + self._error
        if self.guidance_scale is not None:
            difference = self._difference.at(time)
            conditional = noise - (self.guidance_scale - 1) * difference
            noise = torch.cat([conditional - difference, conditional])
        return self._from_noise(time, sample, noise)

    def change(self, time: float, later: float) -> torch.Tensor:
        """By how much the guided prediction will have changed at `later`, for the same sample as at `time`."""
        change = self._noise.at(later) - self._noise.at(time)
        return change if self._levels is None else change / self._levels[time][0]

    def _to_noise(self, time: float, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        prediction = prediction.float()
        if self._levels is None:
            return prediction
        signal, noise = self._levels[time]
        return signal * prediction + noise * sample.float()

    def _from_noise(self, time: float, sample: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self._levels is not None:
            signal, noise = self._levels[time]
            value = (value - noise * sample.float()) / signal
        return value.to(sample.dtype)
