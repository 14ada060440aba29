"""How fast weights travel on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from ascend.memory import give_back_memory
from ascend.planner.plan import Speed

SAMPLE = 64 * 2**20  # bytes: long enough for the rate of large blocks
ROUNDS = 3


def measure_speed(device: torch.device, folder: Path | None) -> Speed:
    """Of copies to `device` from where weights wait for it, and of reading the largest file below `folder`.

    Takes a fraction of a second. Without a file the disk counts as slow as the link.
    """
    link = _measure_link(device)
    disk = _measure_disk(folder) if folder else None
    return Speed(link, disk or link)


def _measure_link(device: torch.device) -> float:
    source = torch.zeros(SAMPLE, dtype=torch.uint8, pin_memory=device.type != "cpu")
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        seconds.append(time.perf_counter() - start)
    del target
    give_back_memory(device)  # the allocator would keep it from the models
    return SAMPLE / min(seconds)


def _measure_disk(folder: Path) -> float | None:
    files = sorted(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    if not files:
        return None
    with files[-1].open("rb", buffering=0) as file:
        # What the kernel has in memory would be another speed.
        os.posix_fadvise(file.fileno(), 0, SAMPLE, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        size = len(file.read(SAMPLE))
    return size / (time.perf_counter() - start)
