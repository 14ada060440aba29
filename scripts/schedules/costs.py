"""What ways of drawing cost, as shares of the arithmetic that all steps take in a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusionPipeline

from runners.cache_options import count_steps, unet_times
from runners.unet_cost import step_flops
from scripts.schedules.drawing import MAX_DOWNSAMPLE, RATIO, Method


class Costs:
    """Of a UNet with this `config`, for latents of so many rows and columns, with or without guidance."""

    def __init__(self, config: Mapping[str, Any], latents: int, guided: bool) -> None:
        self.plain = step_flops(config, latents, latents)
        merging = {"ratio": RATIO, "max_downsample": MAX_DOWNSAMPLE}
        self.merged = step_flops(config, latents, latents, merging=merging)
        self.rows = 2 if guided else 1

    def share(self, pipe: StableDiffusionPipeline, steps: int, method: Method) -> float:
        """With the scheduler of `pipe`; `steps` are those of the picture of all steps."""
        calls = len(unet_times(pipe.scheduler, steps))  # of all steps; PNDM's are one more than steps
        if method.steps:
            return method.steps / calls
        cost = self.merged if method.ratio else self.plain
        if not method.options:
            return cost.full / self.plain.full
        counted = count_steps(pipe.scheduler, steps, method.options)
        shallow_rows = 1 if method.options.get("cache_forecast") else self.rows
        spent = counted["full_steps"] * self.rows * cost.full + counted["shallow_steps"] * shallow_rows * cost.shallow
        return spent / (calls * self.rows * self.plain.full)
