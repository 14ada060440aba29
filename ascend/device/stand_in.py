"""The device that the meta device stands for while a model is run without values, to see what it takes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PLANNED: ContextVar[torch.device | None] = ContextVar("planned device", default=None)


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """Meanwhile code that asks `device_for` takes the way on the meta device that it would take on `device`."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def device_for(device: torch.device) -> torch.device:
    """The device whose kernels are for tensors on `device`: itself, or what the meta device stands for."""
    return (_PLANNED.get() or device) if device.type == "meta" else device
