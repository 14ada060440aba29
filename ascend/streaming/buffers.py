"""The memory of a device that blocks take turns in, and how they get there."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from ascend.streaming.host_copy import Buffer, HostCopy, largest_sizes, new_buffer
from ascend.streaming.turns import Turns

BUFFERS = 2  # one computes, one is filled


class Slot:
    """One buffer on the device, and, where blocks come from files, its pinned twin with the host.

    Events order what happens to it: it is filled after the block before has computed, and computes after it is filled.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer: Buffer = {}
        self.staging: Buffer = {}
        self.block: HostCopy | None = None
        self.filling: Future[None] | None = None
        self.filled: Any = None
        self.computed: Any = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self.filled, self.computed = module.Event(), module.Event()

    def hold(self, sizes: dict[torch.dtype, int], staged: bool) -> None:
        """Have room for so many elements."""
        if any(size > len(self.buffer.get(dtype, ())) for dtype, size in sizes.items()):
            self.buffer = {}  # before the larger one is there
            self.buffer = new_buffer(sizes, self.device)
            self.mark_computed()  # what had this memory before may still be read
        if staged and any(size > len(self.staging.get(dtype, ())) for dtype, size in sizes.items()):
            self.staging = new_buffer(sizes, torch.device("cpu"), pin=True)

    def mark_computed(self) -> None:
        """What was issued until now is the last that reads the buffer."""
        if self.computed is not None:
            self.computed.record(torch.get_device_module(self.device).current_stream(self.device))


class Buffers:
    """The two buffers of a device, which several models may share that do not run at the same time.

    Attributes:
        turns: of the calls of those models.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.turns = device, Turns()
        self.sizes: dict[torch.dtype, int] = {}
        self._begin()
        module = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream = module.Stream(device) if module else None

    def _begin(self) -> None:
        self.process = os.getpid()
        self.slots = [Slot(self.device) for _ in range(BUFFERS)]
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="streaming")

    def check_process(self) -> None:
        """Begin anew in a forked process, to which the thread that fills the buffers has not come along.

        Raises:
            RuntimeError: the device has not come along either.
        """
        if self.process == os.getpid():
            return
        if self.stream is not None:
            raise RuntimeError(
                f"this process was forked from one that streams to {self.device}, which cannot be used here: "
                "start processes by spawn"
            )
        self._begin()

    def reserve(self, copies: list[HostCopy]) -> None:
        """Take note of the blocks that will come; memory is taken when the first one does."""
        for dtype, size in largest_sizes(copies).items():
            self.sizes[dtype] = max(self.sizes.get(dtype, 0), size)

    def start(self, block: HostCopy, slot: Slot) -> None:
        """Begin to fill `slot` with `block`, whose turn comes next."""
        staged = block.is_mapped and self.stream is not None
        slot.hold(self.sizes, staged)
        slot.block = block
        if self.stream is not None and not staged:
            self._fill(block, slot)  # only issues the copies
        else:
            slot.filling = self.executor.submit(self._fill, block, slot)

    def _fill(self, block: HostCopy, slot: Slot) -> None:
        if self.stream is None:
            block.fill(slot.buffer)
            return
        module = torch.get_device_module(self.device)
        module.set_device(self.device)  # of this thread
        if block.is_mapped:
            slot.filled.synchronize()  # the last copy out of the pinned twin
            block.fill(slot.staging)
        with module.stream(self.stream):
            self.stream.wait_event(slot.computed)
            if block.is_mapped:
                for dtype, size in block.sizes.items():
                    slot.buffer[dtype][:size].copy_(slot.staging[dtype][:size], non_blocking=True)
            else:
                block.fill(slot.buffer)
            slot.filled.record(self.stream)

    def finish(self, slot: Slot) -> None:
        """What is computed from now on comes after `slot` is filled."""
        if slot.filling is not None:
            wait([slot.filling])  # an interrupt leaves it to be waited for later
            filling, slot.filling = slot.filling, None
            filling.result()
        if self.stream is not None:
            torch.get_device_module(self.device).current_stream(self.device).wait_event(slot.filled)

    def settle(self) -> None:
        """Free both buffers, whatever was begun."""
        self.check_process()
        for slot in self.slots:
            if slot.block is None:
                continue
            if slot.filling is not None:
                wait([slot.filling])
                slot.filling = None  # whether it failed matters to nobody now
            if self.stream is not None:
                # The event of a copy that was interrupted may never be recorded.
                torch.get_device_module(self.device).current_stream(self.device).wait_stream(self.stream)
            slot.mark_computed()
            slot.block = None

    def drop(self) -> None:
        """Give all memory back; the next block takes it anew."""
        self.settle()
        for slot in self.slots:
            slot.buffer, slot.staging = {}, {}
