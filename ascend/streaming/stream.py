"""Blocks that come to the device while the block before computes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from ascend.streaming.blocks import find_blocks, tensors_of
from ascend.streaming.buffers import Buffers, Slot
from ascend.streaming.host_copy import Buffer, HostCopy, Prepare, new_buffer
from ascend.streaming.kept import Brought, KeptBlock
from ascend.streaming.orders import Orders, kind_of_call
from ascend.streaming.turns import Turns


@dataclass
class Statistics:
    """Of a stream since it began; `stalled_seconds` are those that the host waited for files or for a late guess."""

    loads: int = 0
    bytes: int = 0
    wrong_guesses: int = 0
    stalled_seconds: float = 0.0


class Stream(ModelHook):
    """Of a model whose blocks are streamed: brings each when it is called, and begins with the next.

    Which comes next is what came next in the last call of this kind, at first in the order of definition. Nothing is
    brought before the model is called, as its weights may change between calls. A tensor that several blocks have, or
    that a block has and what is around it, stays on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        buffers: Buffers,
        is_mapped: bool,
        kept: Sequence[nn.Module] = (),
    ) -> None:
        self.buffers, self.execution_device, self.is_mapped = buffers, buffers.device, is_mapped
        self.kept = [KeptBlock(block) for block in kept]
        self.brought = Brought(self.execution_device, is_mapped)
        self.statistics = Statistics()
        shared = shared_tensors(module, blocks)
        self.copies = [HostCopy(block, buffers.device, is_mapped, shared) for block in blocks]
        self.orders = Orders(self.copies)
        self.held: Slot | None = None  # of the block that computes, or computed last
        self.attached: HostCopy | None = None
        self.handles: list[Any] = []  # of what ends with the stream: its hooks, graphs of its blocks
        self.preparation: Prepare | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """All of them, those that stay on the device last."""
        return [copy.module for copy in self.copies] + [block.module for block in self.kept]

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.buffers.reserve(self.copies)
        self._bring_the_rest(module)
        for copy in self.copies:
            self.handles += [
                copy.module.register_forward_pre_hook(partial(self._before, copy)),
                copy.module.register_forward_hook(partial(self._after, copy), always_call=True),
            ]
        self.forward = call_through(module, partial(self._call, module))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self._settle()
        self.prepare(None)
        for copy in self.copies:
            copy.unlock()
        for handle in self.handles:
            handle.remove()
        module._old_forward = self.forward
        for tensor in tensors_of(module):  # what is in no block that came
            self.brought.take_back(tensor)
        return module

    def prepare(self, prepare: Prepare | None) -> None:
        """Bring the blocks into the form that `prepare` gives them on the device, such as an NPU's private formats.

        One at a time, and again when they change; what `prepare` registers undoes it. Blocks from files stay as they
        are there.

        Args:
            prepare: None to undo what the last one did.
        """
        if prepare is None and self.preparation is None:
            return
        self.preparation = prepare
        self._prepare(self.copies)
        for block in self.kept:
            block.forget()
            block.prepare(None if self.is_mapped else prepare)
        self.buffers.reserve(self.copies)

    def _prepare(self, copies: list[HostCopy]) -> None:
        self.buffers.drop()  # whose memory that of one block takes meanwhile
        for copy in copies:
            copy.prepare(self.preparation)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            self._begin(module, args, kwargs)
            output = self.forward(*args, **kwargs)
            self.orders.end()
            return output

        return self.buffers.turns.take(type(module).__name__, call, self._settle)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"{type(module).__name__} is streamed: its weights are gone before a backward pass could read them; "
                "call it under torch.no_grad(), or stop_streaming(module) to train"
            )
        self._settle()
        changed = [copy for copy in self.copies if not copy.is_current()]
        for copy in changed:
            copy.pack()
        if changed and self.preparation is not None:
            self._prepare(changed)
        self.buffers.reserve(changed)
        others = [block for block in self.kept if not block.is_current()]
        for block in others:
            block.forget()
        if changed or others:
            self._bring_the_rest(module)
        for block in others:
            block.prepare(None if self.is_mapped else self.preparation)
        self._start(self.orders.begin(kind_of_call(args, kwargs)))

    def _bring_the_rest(self, module: nn.Module) -> None:
        """What is in no block that comes is on the device while the model is streamed."""
        held = {id(tensor) for copy in self.copies for tensor in copy.tensors()}
        for tensor in tensors_of(module):
            if id(tensor) not in held:
                self.brought.bring(tensor)

    def _settle(self) -> None:
        """Leave nothing of a call, however it ended: all weights are with the host, and both buffers free."""
        if self.attached is not None:
            self.attached.detach()
            self.attached = None
        self.held = None
        self.buffers.settle()

    def _start(self, copy: HostCopy) -> Slot | None:
        slot = next((slot for slot in self.buffers.slots if slot.block is None), None)
        if slot is None:
            return None
        self.buffers.start(copy, slot)
        self.statistics.loads += 1
        self.statistics.bytes += copy.nbytes()
        return slot

    def _slot_of(self, copy: HostCopy) -> Slot:
        slot = next((slot for slot in self.buffers.slots if slot.block is copy), None)
        if slot is None:
            self.statistics.wrong_guesses += 1
            self.buffers.settle()
            slot = self._start(copy)
            assert slot is not None  # both are free
        return slot

    def _before(self, copy: HostCopy, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.buffers.check_process()
        if self.held is not None and self.held.block is copy:  # it is called again
            self._attach(copy, self.held)
            return
        if self.held is not None:
            self.held.block = None  # the next but one may come
        start = time.perf_counter()
        self.held = self._slot_of(copy)
        self.buffers.finish(self.held)
        self.statistics.stalled_seconds += time.perf_counter() - start
        self._attach(copy, self.held)
        following = self.orders.go_on(copy)
        if following is not None:
            self._start(following)

    def _attach(self, copy: HostCopy, slot: Slot) -> None:
        self.attached = copy
        copy.attach(slot.buffer)

    def _after(self, copy: HostCopy, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.held is not None:
            self.held.mark_computed()
        copy.detach()
        self.attached = None


class Loan(ModelHook):
    """Of a model that is on the device only while it is called."""

    def __init__(self, module: nn.Module, device: torch.device, is_mapped: bool) -> None:
        self.execution_device = device
        self.statistics = Statistics()
        self.copy = HostCopy(module, device, is_mapped)
        self.buffer: Buffer | None = None  # while the model is called
        self.turns = Turns()

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.forward = call_through(module, partial(self._call, module))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self._take_back()
        self.copy.unlock()
        module._old_forward = self.forward
        return module

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            self._lend()
            return self.forward(*args, **kwargs)

        return self.turns.take(type(module).__name__, call, self._take_back)

    def _lend(self) -> None:
        if not self.copy.is_current():
            self.copy.pack()
        self.buffer = new_buffer(self.copy.sizes, self.execution_device)
        self.copy.fill(self.buffer)
        self.copy.attach(self.buffer)
        self.statistics.loads += 1
        self.statistics.bytes += self.copy.nbytes()

    def _take_back(self) -> None:
        if self.buffer is not None:
            self.copy.detach()
            self.buffer = None


def call_through(module: Any, call: Callable[..., Any]) -> Any:
    """Let `call` take the place of the forward that accelerate's hooks are around.

    Returns:
        that forward, to be called and to be put back.
    """
    forward = module._old_forward
    module._old_forward = call
    return forward


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
    kept: Collection[str] = (),
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
        kept: names of blocks, as `find_blocks` has them, that go to the device and stay there, too; not all.

    Returns:
        what is in charge of the module; its `statistics` count.

    Raises:
        ValueError: the module has no blocks, or not those to be kept, or hooks of accelerate move its weights already.
    """
    _require_no_hooks(module)
    blocks = find_blocks(module, largest)
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} has no lists of modules, so no blocks to stream: lend_module takes it"
        )
    if not set(kept) < set(blocks):
        raise ValueError(f"kept must name some blocks of {', '.join(blocks)}, not all, and nothing else: {list(kept)}")
    moved = [block for name, block in blocks.items() if name not in kept]
    stream = Stream(module, moved, buffers or Buffers(device), is_mapped, [blocks[name] for name in kept])
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


def _require_no_hooks(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if hasattr(part, "_hf_hook"):
            raise ValueError(
                f"hooks of accelerate move {name or type(module).__name__} already: call remove_all_hooks() of the "
                "pipeline, or stop_streaming, before"
            )
