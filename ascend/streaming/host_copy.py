"""The weights of one block with the host, and their way into a buffer of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ascend.streaming.blocks import aligned, tensors_of
from ascend.streaming.formats import is_locked, locked, of_format, private_format, stored, stored_size

Buffer = dict[torch.dtype, torch.Tensor]  # for each dtype `[elements]`
Prepare = Callable[[nn.Module, ExitStack], None]


class Place(NamedTuple):
    """Where one tensor stands in a buffer of its dtype, in elements, and how.

    Attributes:
        size: with those that fill up the fractals of a private format.
        format: the number of such a format, None for elements in the order of `stride`.
    """

    tensor: torch.Tensor
    start: int
    size: int
    stride: tuple[int, ...]
    format: int | None

    def part(self, buffer: Buffer) -> torch.Tensor:
        """The tensor's elements in `buffer`: `[size]`."""
        return buffer[self.tensor.dtype].narrow(0, self.start, self.size)

    def view(self, buffer: Buffer) -> torch.Tensor:
        """The tensor's part of `buffer`, in its shape, strides and format; in a private one it does not own memory."""
        if self.format is not None:
            return of_format(self.part(buffer), self.tensor.shape, self.format)
        return self.part(buffer).as_strided(self.tensor.shape, self.stride)


class HostCopy:
    """Parameters and buffers of a module, which are in host memory or on the device.

    In host memory they lie one behind the other, pinned where the device has a link of its own, so that a block is one
    copy for each dtype. A block whose tensors are views of mapped files keeps those instead: `is_mapped`.

    What is in a private format of an NPU when it is packed lies in the bytes of that format, and is locked while it is
    with the host, see `formats.locked`. Files hold no such formats: mapped blocks have none, which would have to be
    converted each time that they come.

    Attributes:
        shared: ids of tensors that others have too, which are left alone.
        sizes: elements of each dtype, alignment included.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, is_mapped: bool = False, shared: frozenset[int] = frozenset()
    ) -> None:
        self.module, self.device, self.is_mapped, self.shared = module, device, is_mapped, shared
        self.places: list[Place] = []
        self.packed: Buffer = {}
        self.prepared = ExitStack()  # what `prepare` has registered
        self.pack()

    def tensors(self) -> list[torch.Tensor]:
        """Of the module now, each once."""
        return [tensor for tensor in tensors_of(self.module) if id(tensor) not in self.shared]

    def nbytes(self) -> int:
        return sum(size * dtype.itemsize for dtype, size in self.sizes.items())

    def pack(self) -> None:
        """Take the module's tensors as they are now."""
        before = {id(place.tensor): place for place in self.places if is_locked(place.tensor)}
        sizes: dict[torch.dtype, int] = {}
        places = []
        for tensor in self.tensors():
            place = before.get(id(tensor)) or place_of(tensor, None if self.is_mapped else private_format(tensor))
            start = sizes.get(tensor.dtype, 0)
            places.append(place._replace(start=start))
            sizes[tensor.dtype] = start + aligned(place.size * tensor.element_size()) // tensor.element_size()
        packed: Buffer = {}
        if self.is_mapped:
            at_rest = [place.tensor.data for place in places]
        else:
            packed = new_buffer(sizes, torch.device("cpu"), pin=self.device.type != "cpu")
            at_rest = [place.view(packed) if place.format is None else locked(place.tensor) for place in places]
            for place, rest in zip(places, at_rest, strict=True):
                if place.format is None:
                    rest.copy_(place.tensor.data)
                else:
                    old = before.get(id(place.tensor))
                    place.part(packed).copy_(old.part(self.packed) if old else stored(place.tensor))
        # At once, so that an interrupt leaves what was packed before.
        self.sizes, self.places, self.packed, self.at_rest = sizes, places, packed, at_rest
        self.detach()

    def is_current(self) -> bool:
        """Whether the module has the tensors that were packed, at rest; adapters and `.to()` change that."""
        tensors = self.tensors()
        return len(tensors) == len(self.places) and all(
            tensor is place.tensor and is_same(tensor, rest)
            for tensor, place, rest in zip(tensors, self.places, self.at_rest, strict=True)
        )

    def prepare(self, prepare: Prepare | None) -> None:
        """Let `prepare` change the module on the device, after what it changed before is undone; None only undoes."""
        if self.is_mapped:
            return
        with self._on_device():
            self.prepared.close()
            if prepare is not None:
                prepare(self.module, self.prepared)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Have the module on the device for once, and packed as it is there in the end.

        Each tensor in memory of its own: torch_npu does not cast the parts of a flat one to formats.
        """
        parts = []  # which tensors of a format do not own
        try:
            for place, rest in zip(self.places, self.at_rest, strict=True):
                if place.format is None:
                    place.tensor.data = rest.to(self.device)
                else:
                    parts.append(place.part(self.packed).to(self.device))
                    place.tensor.data = of_format(parts[-1], rest.shape, place.format)
            yield
            self.pack()
        finally:
            self.detach()

    def unlock(self) -> None:
        """Let the host read and change what is in a private format; it is in none then."""
        for place in self.places:
            if place.format is not None and is_locked(place.tensor):
                flat = place.part(self.packed).to(self.device)
                place.tensor.data = of_format(flat, place.tensor.shape, place.format).cpu()

    def fill(self, buffer: Buffer) -> None:
        """Copy the weights to `buffer`; what comes from pinned memory is only issued when this returns."""
        if self.is_mapped:
            for place, rest in zip(self.places, self.at_rest, strict=True):
                place.view(buffer).copy_(rest)
            return
        for dtype, size in self.sizes.items():
            buffer[dtype].narrow(0, 0, size).copy_(self.packed[dtype], non_blocking=True)

    def attach(self, buffer: Buffer) -> None:
        """Let the module compute with what is in `buffer`, which stays until `detach`."""
        for place in self.places:
            place.tensor.data = place.view(buffer)

    def detach(self) -> None:
        """Let the module have its weights at rest again."""
        for place, rest in zip(self.places, self.at_rest, strict=True):
            place.tensor.data = rest


def place_of(tensor: torch.Tensor, number: int | None) -> Place:
    """How `tensor` stands at a buffer's beginning: in the format `number`, or in its strides if they leave no gaps."""
    size = tensor.numel() if number is None else stored_size(tensor)
    return Place(tensor, 0, size, torch.empty_like(tensor, device="meta").stride(), number)


def is_same(tensor: torch.Tensor, rest: torch.Tensor) -> bool:
    """Whether `tensor` is what `rest` is, in the same memory."""
    if is_locked(rest) or is_locked(tensor):
        return is_locked(rest) and is_locked(tensor)
    return (
        tensor.data_ptr() == rest.data_ptr()
        and tensor.dtype == rest.dtype
        and tensor.shape == rest.shape
        and tensor.stride() == rest.stride()
    )


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
