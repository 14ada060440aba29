"""How much memory a call of a model takes beside its weights, without computing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ascend.streaming.blocks import aligned, tensors_of


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, as long as a tensor has them.

    Each is rounded up as the allocators of CUDA and torch_npu round it (`kMinBlockSize` in their
    CachingAllocator). What an operator takes inside, its workspace, is not seen.

    Attributes:
        peak: the most that there was at once, in bytes.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
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
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = aligned(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention takes its result and nothing else, as in a fused kernel; on the meta device torch has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def activation_peak(
    module: nn.Module, inputs: dict[str, Any], fused_attention: bool, call: Callable[..., Any] | None = None
) -> int:
    """Bytes that a call takes at its peak, results included, inputs and weights not.

    Args:
        module: on the meta device.
        inputs: keyword arguments of the call, tensors on the meta device.
        fused_attention: scores are never in memory as a whole.
        call: what is called, if not `module`.

    Raises:
        NotImplementedError, RuntimeError: the model looks at values, which there are none of.
    """
    known = [*tensors_of(module), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))]
    with PeakMemory(known) as memory:
        if fused_attention:
            with FusedAttention():
                (call or module)(**inputs)
        else:
            (call or module)(**inputs)
    return memory.peak
