"""Tensors that depend on shapes alone: made once, and constants of a compiled graph."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

T = TypeVar("T")


def constant_per_shape(function: Callable[..., T]) -> Callable[..., T]:
    """Make `function`, of integers and last a device, once for each set of arguments (the last 64 of them are kept).

    torch.compile calls it while it traces and puts the result into the graph: for an NPU as numbers, which GE folds
    and which a graph on disk brings along, whereas it would have to find a tensor again. `function` returns a tensor
    or a tuple of them, of integers or booleans, which must never be written to.

    Under a dispatch mode nothing is kept or reused: `torch.export` and FakeTensorMode make tensors without values,
    which must not outlive the trace, and cannot use the real ones of other calls.
    """
    cached = functools.lru_cache(maxsize=64)(function)

    @torch.compiler.assume_constant_result
    def as_tensors(*args: Hashable) -> T:
        if _get_current_dispatch_mode() is not None:
            return function(*args)
        with torch.inference_mode(False):  # a tensor first made under inference mode could not serve a training step
            return cached(*args)

    @torch.compiler.assume_constant_result
    def as_numbers(*args: Hashable) -> Any:
        tensors: Any = as_tensors(*args)
        return tensors.tolist() if isinstance(tensors, torch.Tensor) else tuple(t.tolist() for t in tensors)

    @functools.wraps(function)
    def constant(*args: Any) -> Any:
        device = args[-1]
        if device.type != "npu" or not torch.compiler.is_dynamo_compiling():
            return as_tensors(*args)
        numbers = as_numbers(*args)
        if isinstance(numbers, list):
            return torch.tensor(numbers, device=device)
        return tuple([torch.tensor(field, device=device) for field in numbers])

    return constant
