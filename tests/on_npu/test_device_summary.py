"""What `ascend.device` says of the chips is what torch.npu says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ascend.device import DeviceManager, device_summary, find_device, get_all_devices, memory_cleanup, memory_report
from tests.programs import environment

COUNT = torch.npu.device_count()


def run_program(*arguments: str, **changes: str) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "ascend.device", *arguments]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runpy" not in done.stderr
    return done.stdout


def test_every_chip_is_listed_as_torch_npu_describes_it(chip: str) -> None:
    said = device_summary()
    assert said["npu_devices"] == COUNT
    assert list(said["devices"])[:COUNT] == [f"npu:{index}" for index in range(COUNT)]
    for index in range(COUNT):
        entry = said["devices"][f"npu:{index}"]
        free, total = torch.npu.mem_get_info(index)
        assert entry["name"] == entry["chip"] == torch.npu.get_device_name(index) == chip
        assert (entry["memory"]["free"], entry["memory"]["total"]) == (free, total)
        assert ("bfloat16" in entry["dtypes"]) == torch.npu.is_bf16_supported()
    assert "npu" not in said["absent"]
    assert said["versions"]["torch_npu"].startswith(torch.__version__.split("+")[0])


def test_npus_come_before_all_others() -> None:
    assert find_device() == get_all_devices()[0] == torch.device("npu", 0)


@pytest.mark.skipif(COUNT < 2, reason="python -m emulator run --devices 2")
def test_what_is_allocated_on_one_chip_is_not_counted_on_another() -> None:
    memory_cleanup()
    before = memory_report()["npu_memory"]
    x = torch.empty(64 << 20, dtype=torch.uint8, device="npu:1")
    after = memory_report()["npu_memory"]
    # and torch_npu pads what it allocates
    assert after["npu_1"]["allocated_gb"] - before["npu_1"]["allocated_gb"] == pytest.approx(x.nbytes / 2**30, 0.01)
    assert before["npu_1"]["free_gb"] - after["npu_1"]["free_gb"] >= x.nbytes / 2**30
    assert after["npu_0"] == before["npu_0"]
    assert torch.npu.current_device() == 0
    del x
    memory_cleanup()
    assert memory_report()["npu_memory"]["npu_1"]["free_gb"] == before["npu_1"]["free_gb"]


@pytest.mark.skipif(COUNT < 2, reason="python -m emulator run --devices 2")
def test_a_manager_of_one_chip_reads_that_chip() -> None:
    first = DeviceManager("npu:0")
    try:
        second = DeviceManager("npu:1")
        before = [manager.memory_stats()["allocated"] for manager in (first, second)]  # by other tests
        x = torch.empty(1 << 20, dtype=torch.uint8, device=second.device)
        after = [manager.memory_stats()["allocated"] for manager in (first, second)]
        assert after[0] == before[0] and after[1] - before[1] >= x.nbytes
    finally:
        DeviceManager("npu:0")


def test_the_program_prints_every_chip(chip: str) -> None:
    lines = run_program(PREFERRED_DEVICE="").splitlines()
    total = torch.npu.mem_get_info(0)[1] / 2**30
    for index in range(COUNT):
        assert lines[index].startswith(f"npu:{index}   {chip}")
        assert lines[index].endswith(f"of {total:.1f} GiB free")
    assert lines[-2].startswith("preferred: npu:0 (the best there is")


@pytest.mark.skipif(COUNT < 2, reason="python -m emulator run --devices 2")
def test_the_program_sees_the_chips_that_it_may_see() -> None:
    said = json.loads(run_program("--json", ASCEND_RT_VISIBLE_DEVICES="1"))
    assert (said["npu_devices"], list(said["devices"])[0]) == (1, "npu:0")


def test_the_variable_that_hides_all_chips_is_named() -> None:
    said = json.loads(run_program("--json", ASCEND_RT_VISIBLE_DEVICES=""))
    assert said["absent"]["npu"] == "torch_npu sees no NPU (with ASCEND_RT_VISIBLE_DEVICES=)"
    assert said["preferred"] == os.environ.get("PREFERRED_DEVICE", "cpu")
