"""How much memory a call of a model takes beside its weights, without computing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ascend.planner.allocator import Event
from ascend.streaming.blocks import aligned, tensors_of


class Recorder(TorchDispatchMode):
    """Notes when operators make storages, and when the last tensor lets go of them.

    What an operator takes inside, its workspace, is not seen.

    Attributes:
        events: in their order; storages are numbered from 0 on.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.count = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in known:
            self.seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen or not storage.nbytes():
            return
        self.seen.add(storage)
        self.events.append(Event(self.count, storage.nbytes()))
        weakref.finalize(storage, self._forget, self.count)
        self.count += 1

    def _forget(self, number: int) -> None:
        self.events.append(Event(number, None))


class Mixture(TorchFunctionMode):
    """Stands in for the values that HiDream's transformer reads, which meta has not.

    Each expert gets as many rows as the others, where `MOEFeedForwardSwiGLU.moe_infer` counts them by `bincount`. The
    sizes of the picture, which `patchify` makes a tensor of, stay on the CPU.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bincount:
            rows, more = divmod(args[0].numel(), self.experts)
            return torch.tensor([rows + (expert < more) for expert in range(self.experts)], device="cpu")
        if func is torch.tensor:
            return func(*args, **((kwargs or {}) | {"device": "cpu"}))
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """Attention takes its result and nothing else, as in a fused kernel; on the meta device torch has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def record_call(
    module: nn.Module, inputs: dict[str, Any], fused_attention: bool, call: Callable[..., Any] | None = None
) -> list[Event]:
    """What a call takes of memory and gives back, results included, inputs and weights not.

    Args:
        module: on the meta device.
        inputs: keyword arguments of the call, tensors on the meta device.
        fused_attention: scores are never in memory as a whole.
        call: what is called, if not `module`.

    Raises:
        NotImplementedError, RuntimeError: the model looks at values, which there are none of.
    """
    experts = [len(list(part.children())) for name, part in module.named_modules() if name.split(".")[-1] == "experts"]
    with (
        Mixture(experts[0]) if experts else nullcontext(),
        FusedAttention() if fused_attention else nullcontext(),
        Recorder([*tensors_of(module), *tensors_in(inputs)]) as recorder,
    ):
        (call or module)(**inputs)
    return recorder.events


def tensors_in(inputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def peak_of(events: list[Event]) -> int:
    """Bytes of the tensors that there are at once, at the most, each rounded up as allocators do."""
    sizes: dict[int, int] = {}
    live = peak = 0
    for number, size in events:
        if size is None:
            live -= sizes[number]
        else:
            sizes[number] = aligned(size)
            live += sizes[number]
            peak = max(peak, live)
    return peak
