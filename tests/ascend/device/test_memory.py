"""Memory of all devices together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend.device import get_all_devices, get_memory_info, memory_cleanup, memory_report

MIB_IN_GIB = 1 / 1024


def test_the_report_has_the_totals_of_the_devices_and_counts_what_others_use(
    run_with_accelerators: Callable[..., Any],
) -> None:
    report = run_with_accelerators("from ascend.device import memory_report; result = memory_report()")
    expected = {
        "total_gb": 21 * MIB_IN_GIB,
        "free_gb": 7 * MIB_IN_GIB,
        "allocated_gb": 2 * MIB_IN_GIB,
        "reserved_gb": 3 * MIB_IN_GIB,
        "max_allocated_gb": 4 * MIB_IN_GIB,
    }
    assert report["npu_memory"] == {
        "npu_0": expected,
        "npu_1": {**expected, "total_gb": 42 * MIB_IN_GIB, "free_gb": 14 * MIB_IN_GIB},
    }
    assert report["vram"] == {"gpu_0": expected}


def test_the_report_of_the_host_adds_up() -> None:
    report = memory_report()
    ram = report["ram"]
    assert ram["total_gb"] == get_memory_info(torch.device("cpu"))["total"] / 2**30
    assert ram["used_gb"] + ram["available_gb"] == pytest.approx(ram["total_gb"])
    assert ram["percent"] == pytest.approx(100 * ram["used_gb"] / ram["total_gb"])
    kinds = [device.type for device in get_all_devices()]
    assert (len(report["npu_memory"]), len(report["vram"])) == (kinds.count("npu"), kinds.count("cuda"))


def test_cleaning_up_empties_the_cache_of_each_type_once(run_with_accelerators: Callable[..., Any]) -> None:
    emptied = run_with_accelerators(
        "from ascend.device import memory_cleanup; memory_cleanup(); result = torch_npu.emptied"
    )
    assert emptied == ["Ascend310P3", "GPU"]


def test_cleaning_up_frees_tensors_in_circles() -> None:
    class Owner:
        tensor: torch.Tensor
        itself: Owner

    gc.disable()
    try:
        owner = Owner()
        owner.itself, owner.tensor = owner, torch.ones(3)
        tensor = weakref.ref(owner.tensor)
        del owner
        assert tensor() is not None
        memory_cleanup()
        assert tensor() is None
    finally:
        gc.enable()
