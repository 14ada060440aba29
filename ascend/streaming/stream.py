"""Blocks that come to the device while the block before computes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from ascend.streaming.blocks import find_blocks, tensors_of
from ascend.streaming.host_copy import Buffer, HostCopy, largest_sizes, new_buffer

BUFFERS = 2  # one computes, one is filled


@dataclass
class Statistics:
    """Of a stream since it began; `stalled_seconds` are those that the host waited for files or for a late guess."""

    loads: int = 0
    bytes: int = 0
    wrong_guesses: int = 0
    stalled_seconds: float = 0.0


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
    """The two buffers of a device, which several models may share that do not run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots = [Slot(device) for _ in range(BUFFERS)]
        self.sizes: dict[torch.dtype, int] = {}
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="streaming")
        module = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream = module.Stream(device) if module else None

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
            filling, slot.filling = slot.filling, None
            filling.result()
        if self.stream is not None:
            torch.get_device_module(self.device).current_stream(self.device).wait_event(slot.filled)

    def settle(self) -> None:
        """Free both buffers, whatever was begun."""
        for slot in self.slots:
            if slot.block is not None:
                slot.block = None
                self.finish(slot)
                slot.mark_computed()

    def drop(self) -> None:
        """Give all memory back; the next block takes it anew."""
        self.settle()
        for slot in self.slots:
            slot.buffer, slot.staging = {}, {}


class Stream(ModelHook):
    """Of a model whose blocks are streamed: brings each when it is called, and begins with the next.

    Which comes next is what came next in the last call of the model, at first in the order of definition. Nothing is
    brought before the model is called, as its weights may change between calls. A tensor that several blocks have, or
    that a block has and what is around it, stays on the device.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], buffers: Buffers, is_mapped: bool) -> None:
        self.buffers, self.execution_device = buffers, buffers.device
        self.statistics = Statistics()
        shared = shared_tensors(module, blocks)
        self.copies = [HostCopy(block, buffers.device, is_mapped, shared) for block in blocks]
        self.next: dict[HostCopy, HostCopy | None] = dict(zip(self.copies, [*self.copies[1:], None], strict=True))
        self.first: HostCopy | None = self.copies[0]
        self.last: HostCopy | None = None  # of this call
        self.active: Slot | None = None
        self.handles: list[Any] = []

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.buffers.reserve(self.copies)
        self._bring_the_rest(module)
        for copy in self.copies:
            self.handles += [
                copy.module.register_forward_pre_hook(partial(self._before, copy)),
                copy.module.register_forward_hook(partial(self._after, copy), always_call=True),
            ]
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for handle in self.handles:
            handle.remove()
        self._settle()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"{type(module).__name__} is streamed: its weights are gone before a backward pass could read them; "
                "call it under torch.no_grad(), or stop_streaming(module) to train"
            )
        self._settle()
        changed = [copy for copy in self.copies if not copy.is_current()]
        for copy in changed:
            copy.pack()
        self.buffers.reserve(changed)
        if changed:
            self._bring_the_rest(module)
        self.last = None
        self._start(self.first)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.last is not None:
            self.next[self.last] = None
        return output

    def _bring_the_rest(self, module: nn.Module) -> None:
        """What is in no block is on the device while the model is streamed."""
        held = {id(tensor) for copy in self.copies for tensor in copy.tensors()}
        for tensor in tensors_of(module):
            if id(tensor) not in held:
                tensor.data = tensor.data.to(self.execution_device)

    def _settle(self) -> None:
        """Leave nothing of a call that ended early."""
        if self.active is not None:
            assert self.active.block is not None
            self.active.block.detach()
            self.active = None
        self.buffers.settle()

    def _start(self, copy: HostCopy | None) -> Slot | None:
        slot = next((slot for slot in self.buffers.slots if slot.block is None), None)
        if copy is None or slot is None:
            return None
        self.buffers.start(copy, slot)
        self.statistics.loads += 1
        self.statistics.bytes += copy.nbytes()
        return slot

    def _slot_of(self, copy: HostCopy) -> Slot:
        slot = next((slot for slot in self.buffers.slots if slot.block is copy), None)
        if slot is None:
            self.statistics.wrong_guesses += self.last is not None
            self.buffers.settle()
            slot = self._start(copy)
            assert slot is not None  # both are free
        return slot

    def _before(self, copy: HostCopy, module: nn.Module, args: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        slot = self._slot_of(copy)
        if self.last is None:
            self.first = copy
        else:
            self.next[self.last] = copy
        self.last = copy
        self.buffers.finish(slot)
        self.statistics.stalled_seconds += time.perf_counter() - start
        copy.attach(slot.buffer)
        self.active = slot
        following = self.next[copy]
        if following is not copy:
            self._start(following)

    def _after(self, copy: HostCopy, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        copy.detach()
        if self.active is not None:
            self.active.mark_computed()
            self.active.block = None
            self.active = None


class Loan(ModelHook):
    """Of a model that is on the device only while it is called."""

    def __init__(self, module: nn.Module, device: torch.device, is_mapped: bool) -> None:
        self.execution_device = device
        self.statistics = Statistics()
        self.copy = HostCopy(module, device, is_mapped)
        self.is_attached = False

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self._take_back()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._take_back()  # of a call that ended early
        if not self.copy.is_current():
            self.copy.pack()
        buffer = new_buffer(self.copy.sizes, self.execution_device)
        self.copy.fill(buffer)
        self.copy.attach(buffer)
        self.is_attached = True
        self.statistics.loads += 1
        self.statistics.bytes += self.copy.nbytes()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._take_back()
        return output

    def _take_back(self) -> None:
        if self.is_attached:
            self.copy.detach()
            self.is_attached = False


def shared_tensors(module: nn.Module, blocks: Sequence[nn.Module]) -> frozenset[int]:
    """Ids of the tensors that stand in several blocks, or in one and outside of all."""
    inside = Counter(id(tensor) for block in blocks for tensor in tensors_of(block))
    members = {id(part) for block in blocks for part in block.modules()}
    outside = {
        id(tensor)
        for part in module.modules()
        if id(part) not in members
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    return frozenset(key for key, count in inside.items() if count > 1 or key in outside)


def stream_module(
    module: nn.Module,
    device: torch.device,
    buffers: Buffers | None = None,
    largest: int | None = None,
    is_mapped: bool = False,
) -> Stream:
    """Compute `module` on `device` and keep its blocks' weights with the host, but for two at a time.

    While one block computes, the next is copied, on a stream of its own; no call waits for the device. Results are
    those of a module that is on the device, to the bit. What is in no block goes to the device and stays there.
    `stop_streaming` ends it.

    Args:
        module: in evaluation; its weights are anywhere.
        buffers: shared with other models that do not run at the same time; its own by default.
        largest: bytes of a block, where there is a choice, see `find_blocks`.
        is_mapped: the weights are views of mapped files, and read from there each time.

    Returns:
        what is in charge of the module; its `statistics` count.

    Raises:
        ValueError: the module has no blocks, or hooks of accelerate move its weights already.
    """
    _require_no_hooks(module)
    blocks = find_blocks(module, largest)
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} has no lists of modules, so no blocks to stream: lend_module takes it"
        )
    stream = Stream(module, list(blocks.values()), buffers or Buffers(device), is_mapped)
    add_hook_to_module(module, stream)
    return stream


def lend_module(module: nn.Module, device: torch.device, is_mapped: bool = False) -> Loan:
    """Bring `module` to `device` for each call, and only for that. Nothing is copied back: `stop_streaming` ends it.

    Raises:
        ValueError: hooks of accelerate move its weights already.
    """
    _require_no_hooks(module)
    loan = Loan(module, device, is_mapped)
    add_hook_to_module(module, loan)
    return loan


def stop_streaming(module: nn.Module) -> None:
    """Undo `stream_module` or `lend_module`; does nothing where neither was called. Weights are with the host then."""
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, Stream | Loan):
        remove_hook_from_module(module)
    if isinstance(hook, Stream):
        for tensor in tensors_of(module):
            tensor.data = tensor.data.to("cpu")


def _require_no_hooks(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if hasattr(part, "_hf_hook"):
            raise ValueError(
                f"hooks of accelerate move {name or type(module).__name__} already: call remove_all_hooks() of the "
                "pipeline, or stop_streaming, before"
            )
