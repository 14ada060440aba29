"""A service for tests: its settings, and replicas that are made up, behind a handle as Ray Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError

from runners.clip.checkpoint import SOFTMAX, Scoring
from runners.clip.serving.replica import About
from runners.clip.serving.settings import Settings

DEFAULTS: dict[str, Any] = {
    "backend": "torch",
    "dtype": None,
    "kernels": False,
    "compiled": False,
    "kind": "cpu",
    "replicas": 1,
    "threads": 1,
    "batch_size": 4,
    "wait_seconds": 0.05,
    "pending": 8,
    "inputs": 8,
    "pixels": 10_000,
    "body_bytes": 4000,
    "timeout_seconds": 30.0,
    "token": None,
}


def settings_for(model: Path, **changes: Any) -> Settings:
    return Settings(str(model), **DEFAULTS | changes)


class Method:
    """As of Ray Serve's handle."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.answer = answer

    def remote(self, *given: Any) -> Awaitable[Any]:
        return self.answer(*given)


class Handle:
    """Texts are as long as their feature says. `lost` calls end with their replica, and `free` lets others go on."""

    def __init__(self) -> None:
        self.lost, self.calls, self.free = 0, 0, asyncio.Event()
        self.free.set()
        self.about, self.texts, self.pictures = Method(self._about), Method(self._features), Method(self._features)

    async def _about(self) -> About:
        return About("cpu", 77, False, Scoring(SOFTMAX, 10.0, 0.0))

    async def _features(self, batch: Any) -> np.ndarray:
        self.calls += 1
        if self.lost:
            self.lost -= 1
            raise ActorDiedError
        await self.free.wait()
        angles = [float(len(each)) for each in batch]
        rows = np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)
        rows.setflags(write=False)  # as Ray's
        return rows


def die_for_good(handle: Handle) -> None:
    """From now on no call is ever answered, as Ray Serve's router waits for a replica."""
    for name in ("about", "texts", "pictures"):
        setattr(handle, name, Method(_never))


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()
