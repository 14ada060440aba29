"""A denoising step waits for nothing, with all schedulers but two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from runners.schedulers import SCHEDULERS, make_scheduler

# Upstream's own waits in each step: DDPM looks for the timestep among those on the device, and UniPC copies the small
# system that it solves on the host to the device.
WAITING = ("ddpm", "unipc")


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    yield
    torch.npu.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in WAITING])
def test_no_step_waits_for_the_device(npu: torch.device, tiny_sd: StableDiffusionPipeline, name: str) -> None:
    pipe = tiny_sd.to(npu, torch.float16)
    pipe.scheduler = make_scheduler(name, pipe.scheduler)

    def forbid_waits(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert timestep.device == npu
        last = step == pipe.num_timesteps - 1
        torch.npu.set_sync_debug_mode("default" if last else "error")  # the first step finds its place in the tables
        return tensors

    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "output_type": "latent", "callback_on_step_end": forbid_waits}
    assert pipe("a red circle", num_inference_steps=4, **options).images.isfinite().all()
