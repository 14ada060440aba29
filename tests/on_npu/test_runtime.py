"""Devices, memory, streams, events and errors, through torch_npu."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from tests.on_npu.helpers import FAMILY
from tests.programs import Run, environment, run_forked

emulated = pytest.mark.skipif("CANN_EMULATOR_SOC" not in os.environ, reason="of the emulator")


def test_the_device_is_what_it_says(npu: torch.device, chip: str) -> None:
    assert torch.npu.is_available()
    assert torch.npu.get_device_name(npu) == chip
    free, total = torch.npu.mem_get_info(npu)
    assert 0 < free <= total
    assert torch.npu.is_bf16_supported() == (torch.bfloat16 in FAMILY.dtypes)
    assert torch.npu.utils.is_support_inf_nan() == (not FAMILY.saturates)


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
    begin = time.perf_counter()
    start.record()
    start.synchronize()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 20 <= start.elapsed_time(end) <= (time.perf_counter() - begin) * 1e3


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
    """In a process of its own: nothing runs in one after an error behind the program."""
    program = """
import torch, torch_npu
try:
    torch.cummax(torch.ones(3, 4, device="npu"), dim=0)[0].cpu()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "operator Cummax is not emulated" in done.stdout and "Adding an operator" in done.stdout


@emulated
def test_a_crash_of_torch_npu_after_an_error_shows_the_error() -> None:
    program = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=True)
x = torch.zeros(4, 3, device="npu")
x[torch.tensor([1, 2], device="npu")] = 1
"""
    settings = os.environ | {"TASK_QUEUE_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Adding an operator" in done.stderr


@emulated
def test_asynchronous_streams_run_behind_the_program() -> None:
    program = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=False)
x = torch.ones(900, 900, device="npu")
torch.npu.synchronize()
behind = False
for _ in range(8):
    y = x @ x
    behind |= not torch.npu.current_stream().query()
print(behind)
torch.npu.synchronize()
print(torch.npu.current_stream().query(), y[0, 0].item())
"""
    settings = os.environ | {"CANN_EMULATOR_ASYNC": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "900.0"]


COUNT = """
import torch
count = torch.npu.device_count()
print(count, [torch.ones(2, device=f"npu:{device}").sum().item() for device in range(count)])
torch.ones(2, device=f"npu:{count}")
"""
VISIBLE = {
    None: [0, 1, 2, 3],
    "2": [2],
    "1,3": [1, 3],
    "1, 3": [1],
    "0,2,4": [0, 2],
    "3,x": [3],
    "0,1,": [0, 1],
}
REFUSED = {
    "1,0": "configured in ascending order",
    "0,2,1": "configured in ascending order",
    "1,1": "cannot be duplicated",
    "4": "[0, 4)",
    "-1": "[0, 4)",
    "": "[0, 4)",
}
# As on a card, where there is no emulator to name the chip.
UNNAMED = """
import os, torch
torch.npu.get_device_name(0)
del os.environ["CANN_EMULATOR_SOC"]
from tests.on_npu.helpers import SATURATES
print(SATURATES)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, subprocess.CompletedProcess[str]]:
    """Programs on a machine with four chips, by what ASCEND_RT_VISIBLE_DEVICES leaves of them; `UNNAMED` by itself."""
    folder = tmp_path_factory.mktemp("visible")
    programs = dict.fromkeys(VISIBLE, COUNT) | dict.fromkeys(REFUSED, "import torch; torch.npu.set_device(0)")
    runs: list[Run] = []
    for number, (visible, code) in enumerate([*programs.items(), (None, UNNAMED)]):
        path = folder / f"{number}.py"
        path.write_text(code)
        runs.append(([path], {} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
        found = run_forked(runs, ["torch_npu"], environment(CANN_EMULATOR_DEVICES="4"))
    return dict(zip([*programs, UNNAMED], found, strict=True))


@emulated
@pytest.mark.parametrize(("visible", "numbers"), VISIBLE.items())
def test_a_process_sees_the_devices_that_cann_would_leave_it(
    seen: dict[str | None, subprocess.CompletedProcess[str]], visible: str | None, numbers: list[int]
) -> None:
    done = seen[visible]
    assert done.stdout.strip() == f"{len(numbers)} {[2.0] * len(numbers)}", done.stderr[-2000:]
    assert done.returncode != 0  # there is no further one


@emulated
@pytest.mark.parametrize(("visible", "expected"), REFUSED.items())
def test_devices_that_cann_would_refuse_are_refused_with_its_error(
    seen: dict[str | None, subprocess.CompletedProcess[str]], visible: str, expected: str
) -> None:
    done = seen[visible]
    assert done.returncode != 0
    error = f"EE2002: Value {visible} for environment variable ASCEND_RT_VISIBLE_DEVICES is invalid. Expected value: "
    assert error + expected in done.stderr


@emulated
def test_the_tests_take_the_chip_from_the_device(
    seen: dict[str | None, subprocess.CompletedProcess[str]], chip: str
) -> None:
    done = seen[UNNAMED]
    assert done.stdout.strip() == str(chip.startswith("Ascend310P")), done.stderr[-2000:]
