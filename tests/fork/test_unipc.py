"""UniPC's coefficients are computed with the host. Its numbers are in test_hidream_editing.py."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


class SizesOf(TorchDispatchMode):
    """Notes devices and sizes of what operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.small: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.device.type == "meta" and result.numel() < 8:
            self.small.append(str(function))
        return result


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, FLOW], ids=["diffusion", "flow"])
def test_no_coefficient_is_on_the_device(order: int, options: dict) -> None:
    scheduler = UniPCMultistepScheduler(solver_order=order, **options)
    scheduler.set_timesteps(6)
    sample = torch.empty(1, 4, 8, 8, device="meta")
    with SizesOf() as sizes:
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.empty_like(sample), timestep, sample).prev_sample
    assert sizes.small == [] and sample.shape == (1, 4, 8, 8)
