"""Tensors that depend on shapes alone: made once, and constants of a compiled graph."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")


def constant_per_shape(function: Callable[..., T]) -> Callable[..., T]:
    """Make `function`, of integers and a device, once for each set of arguments (the last 64 of them are kept).

    torch.compile calls it while it traces and puts the result into the graph. Its tensors must never be written to.
    """
    cached = functools.lru_cache(maxsize=64)(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def constant(*args: Hashable) -> T:
        with torch.inference_mode(False):  # a tensor first made under inference mode could not serve a training step
            return cached(*args)

    return constant
