"""Numbers to compute with, for programs as well that have no device yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, low: float = -3, high: float = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(tuple(shape), generator=generator) < 0.5
    if not dtype.is_floating_point:
        low, high = (0, 10) if dtype == torch.uint8 else (-10, 10)
        return torch.randint(int(low), int(high), tuple(shape), generator=generator, dtype=dtype)
    return (torch.rand(tuple(shape), generator=generator) * (high - low) + low).to(dtype)
