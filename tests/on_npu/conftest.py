"""Tests that need an NPU, an emulated one or a card: collected where torch_npu sees one, and nowhere else.

python -m emulator run --soc Ascend310P3 -- python -m pytest tests/on_npu
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Launches on the calling thread: after one that fails, torch_npu's queue would run nothing more in this process.
os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
import torch

from ascend.device import DeviceManager, get_chip, is_npu_available

ON_NPU = "CANN_EMULATOR_SOC" in os.environ or is_npu_available()
collect_ignore_glob = [] if ON_NPU else ["test_*.py"]


@pytest.fixture(scope="session")
def npu() -> torch.device:
    return DeviceManager("npu").device


@pytest.fixture(scope="session")
def chip(npu: torch.device) -> str:
    name = get_chip(npu)
    assert name is not None
    return name


@pytest.fixture(autouse=True)
def finish(npu: torch.device) -> Iterator[None]:
    yield
    torch.npu.synchronize()  # so that a failed launch fails the test that made it
