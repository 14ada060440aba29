"""The weights of one block with the host, and their way into a buffer of the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ascend.streaming.blocks import aligned, tensors_of

Buffer = dict[torch.dtype, torch.Tensor]  # for each dtype `[elements]`


class Place(NamedTuple):
    """Where one tensor stands in a buffer of its dtype, in elements."""

    tensor: torch.Tensor
    start: int

    def view(self, buffer: Buffer) -> torch.Tensor:
        """The tensor's part of `buffer`, in its shape."""
        return buffer[self.tensor.dtype].narrow(0, self.start, self.tensor.numel()).view(self.tensor.shape)


class HostCopy:
    """Parameters and buffers of a module, which are in host memory or on the device.

    In host memory they lie one behind the other, pinned where the device has a link of its own, so that a block is one
    copy for each dtype. A block whose tensors are views of mapped files keeps those instead: `is_mapped`.

    Attributes:
        shared: ids of tensors that others have too, which are left alone.
        sizes: elements of each dtype, alignment included.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, is_mapped: bool = False, shared: frozenset[int] = frozenset()
    ) -> None:
        self.module, self.device, self.is_mapped, self.shared = module, device, is_mapped, shared
        self.pack()

    def tensors(self) -> list[torch.Tensor]:
        """Of the module now, each once."""
        return [tensor for tensor in tensors_of(self.module) if id(tensor) not in self.shared]

    def nbytes(self) -> int:
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    def pack(self) -> None:
        """Take the module's tensors as they are now."""
        sizes: dict[torch.dtype, int] = {}
        places = []
        for tensor in self.tensors():
            start = sizes.get(tensor.dtype, 0)
            places.append(Place(tensor, start))
            sizes[tensor.dtype] = start + aligned(tensor.nbytes) // tensor.element_size()
        packed: Buffer = {}
        if self.is_mapped:
            at_rest = [place.tensor.data for place in places]
        else:
            packed = new_buffer(sizes, torch.device("cpu"), pin=self.device.type != "cpu")
            at_rest = [place.view(packed) for place in places]
            for place, rest in zip(places, at_rest, strict=True):
                rest.copy_(place.tensor.data)
        # At once, so that an interrupt leaves what was packed before.
        self.sizes, self.places, self.packed, self.at_rest = sizes, places, packed, at_rest
        self.detach()

    def is_current(self) -> bool:
        """Whether the module has the tensors that were packed, at rest; adapters and `.to()` change that."""
        tensors = self.tensors()
        return len(tensors) == len(self.places) and all(
            tensor is place.tensor and tensor.data_ptr() == rest.data_ptr()
            for tensor, place, rest in zip(tensors, self.places, self.at_rest, strict=True)
        )

    def fill(self, buffer: Buffer) -> None:
        """Copy the weights to `buffer`; what comes from pinned memory is only issued when this returns."""
        if self.is_mapped:
            for place, rest in zip(self.places, self.at_rest, strict=True):
                place.view(buffer).copy_(rest)
            return
        for dtype, size in self.sizes.items():
            buffer[dtype].narrow(0, 0, size).copy_(self.packed[dtype], non_blocking=True)

    def attach(self, buffer: Buffer) -> None:
        """Let the module compute with what is in `buffer`."""
        for place in self.places:
            place.tensor.data = place.view(buffer)

    def detach(self) -> None:
        """Let the module have its weights at rest again."""
        for place, rest in zip(self.places, self.at_rest, strict=True):
            place.tensor.data = rest


def new_buffer(sizes: dict[torch.dtype, int], device: torch.device, pin: bool = False) -> Buffer:
    """Memory without values for so many elements of each dtype."""
    return {dtype: torch.empty(size, dtype=dtype, device=device, pin_memory=pin) for dtype, size in sizes.items()}


def largest_sizes(copies: list[HostCopy]) -> dict[torch.dtype, int]:
    """What a buffer has to hold to take any of `copies`."""
    sizes: dict[torch.dtype, int] = {}
    for copy in copies:
        for dtype, size in copy.sizes.items():
            sizes[dtype] = max(sizes.get(dtype, 0), size)
    return sizes
