"""Devices, memory, streams, events and errors, through torch_npu."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

emulated = pytest.mark.skipif("CANN_EMULATOR_SOC" not in os.environ, reason="of the emulator")


def test_the_device_is_what_it_says(npu: torch.device, chip: str) -> None:
    assert torch.npu.is_available()
    assert torch.npu.get_device_name(npu) == chip
    free, total = torch.npu.mem_get_info(npu)
    assert 0 < free <= total
    assert torch.npu.is_bf16_supported() == (not chip.startswith("Ascend310P"))


def test_copies_between_host_and_device() -> None:
    source = torch.arange(1000.0)
    assert torch.equal(source.to("npu").cpu(), source)
    pinned = source.pin_memory()
    assert pinned.is_pinned()
    moved = pinned.to("npu", non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(moved.cpu(), source)
    there = torch.empty(4, 5, device="npu")
    there[:, 1:3] = torch.ones(4, 2)
    assert there[:, 1:3].cpu().sum() == 8


def test_memory_is_counted_and_given_back() -> None:
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before >= 1 << 20
    del x
    assert torch.npu.memory_allocated() == before


def test_a_full_device_is_an_out_of_memory_error(npu: torch.device) -> None:
    total = torch.npu.mem_get_info(npu)[1]
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory. Tried to allocate"):
        torch.empty(total + 1, dtype=torch.uint8, device="npu")
    assert torch.ones(3, device="npu").sum().item() == 3  # the device goes on


def test_events_measure_time() -> None:
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 20 <= start.elapsed_time(end) < 2000


def test_streams() -> None:
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        x = torch.ones(100, 100, device="npu") @ torch.ones(100, 100, device="npu")
        done = stream.record_event()
    torch.npu.current_stream().wait_event(done)
    assert (x + 1)[0, 0].item() == 101
    stream.synchronize()
    assert stream.query()


@emulated
def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError, match="invalid|does not exist|should be"):
        torch.empty(1, device="npu:7")


@emulated
def test_an_operator_that_is_not_emulated_is_an_error_with_its_name() -> None:
    x = torch.randn(3, 4, device="npu")
    with pytest.raises(RuntimeError, match="Adding an operator"):
        torch.cummax(x, dim=0)[0].cpu()


@emulated
def test_a_crash_of_torch_npu_after_an_error_shows_the_error() -> None:
    program = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=True)
x = torch.zeros(4, 3, device="npu")
x[torch.tensor([1, 2], device="npu")] = 1
"""
    environment = os.environ | {"TASK_QUEUE_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Adding an operator" in done.stderr


@emulated
def test_asynchronous_streams_run_behind_the_program() -> None:
    program = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=False)
x = torch.ones(900, 900, device="npu")
torch.npu.synchronize()
for _ in range(8):
    y = x @ x
print(torch.npu.current_stream().query())
torch.npu.synchronize()
print(torch.npu.current_stream().query(), y[0, 0].item())
"""
    environment = os.environ | {"CANN_EMULATOR_ASYNC": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "900.0"]
