"""Copies to and from an accelerator, beside what the program computes on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class CopyStream:
    """A stream of `device` on which all tensors of a store are allocated, filled and read, so that these are in order.

    On the CPU, where a copy is done when it returns, everything here is nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = self._module and self._module.Stream(device)

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._module is None else self._module.stream(self._stream)

    def follow(self, tensor: torch.Tensor) -> None:
        """Let the copies wait for what the caller's stream writes into `tensor`, and its memory for the copies."""
        if self._module is not None and tensor.device == self._device:
            self._stream.wait_stream(self._module.current_stream(self._device))
            tensor.record_stream(self._stream)

    def record(self) -> Any:
        """An event after the copies so far, None on the CPU."""
        return self._stream and self._stream.record_event()

    def hand_over(self, tensor: torch.Tensor, ready: Any) -> None:
        """Let the caller's stream wait for `ready`, and the memory of `tensor` for what that stream does with it."""
        if self._module is not None:
            stream = self._module.current_stream(self._device)
            stream.wait_event(ready)
            tensor.record_stream(stream)
