"""The device that a program computes on."""

from __future__ import annotations

import functools
import os
import random
import sys
from typing import Any

import torch

from ascend.device.discovery import default_device, find_device
from ascend.device.properties import best_dtype
from ascend.memory import give_back_memory, read_memory, reset_peak_memory
from ascend.placement import load_safetensors, place_pipeline
from ascend.planner.calls import Request


def set_seed(seed: int) -> None:
    """Seed the generators of Python, of NumPy where it is in use, and of torch on every device."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds the accelerators' default generators as well


@functools.cache
def _use_precompiled_kernels() -> None:
    npu = torch.get_device_module("npu")
    # 310P defaults to compiling every operator for every shape it meets, minutes for a first picture.
    npu.set_compile_mode(jit_compile=False)
    # And to convolutions with results in a private format, after which every operator is of the compiled kind again.
    npu.config.allow_internal_format = False


class DeviceManager:
    """The device that a program computes on, chosen once.

    Args:
        preferred_device: as for `find_device`; None takes the environment's `PREFERRED_DEVICE`, else the best device.

    Attributes:
        device: with its index, and made the current device.
        dtype: the best dtype for inference there, see `best_dtype`.

    Raises:
        DeviceError: there is no such device.
    """

    def __init__(self, preferred_device: str | torch.device | None = None) -> None:
        if preferred_device is None:
            self.device = default_device()
        else:
            self.device = find_device(preferred_device)
        if self.device.type == "npu":
            _use_precompiled_kernels()
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)
        self.dtype = best_dtype(self.device)

    def create_generator(self, seed: int) -> torch.Generator:
        """A seeded generator on the CPU: there a seed gives the same numbers whatever the device."""
        return torch.Generator().manual_seed(seed)

    def memory_stats(self) -> dict[str, int]:
        """Bytes, see `ascend.memory.read_memory`."""
        return read_memory(self.device)

    def reset_peak_memory(self) -> None:
        """See `ascend.memory.reset_peak_memory`."""
        reset_peak_memory(self.device)

    def empty_cache(self) -> None:
        """Return unused memory of the allocator to the device."""
        give_back_memory(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def load_safetensors(self, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
        """See `ascend.placement.load_safetensors`."""
        return load_safetensors(path, self.device)

    def set_memory_efficient_mode(self, pipe: Any, request: Request | None = None, **options: Any) -> list[str]:
        """See `ascend.placement.place_pipeline`, which takes the other arguments: for what, and `limit` in bytes."""
        return place_pipeline(pipe, self.device, request, **options)
