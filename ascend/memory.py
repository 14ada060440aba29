"""How much memory there is and is used, of a device and of the host, and what torch and the C library keep of it."""

from __future__ import annotations

import ctypes

import torch

from ascend.cgroup import read_allowances

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def read_memory(device: torch.device) -> dict[str, int]:
    """Memory of `device` in bytes.

    Returns:
        `total` and `free` of the device; `allocated` by tensors and `reserved` by torch's allocator, of this process;
        `peak`, the most that was allocated since `reset_peak_memory`. On the CPU `total` and `free` are the host's,
        or less where a control group (a container) limits the process; `allocated` and `reserved` are the process's
        resident memory and `peak` its high-water mark.
    """
    if device.type == "cpu":
        return _host_memory_info()
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    return {
        "total": total,
        "free": free,
        "allocated": module.memory_allocated(device),
        "reserved": module.memory_reserved(device),
        "peak": module.max_memory_allocated(device),
    }


def _host_memory_info() -> dict[str, int]:
    import psutil

    machine, resident = psutil.virtual_memory(), psutil.Process().memory_info().rss
    allowances = read_allowances()
    return {
        "total": min([machine.total, *(allowance.total for allowance in allowances)]),
        "free": min([machine.available, *(allowance.free for allowance in allowances)]),
        "allocated": resident,
        "reserved": resident,
        "peak": max(resident, _host_peak()),
    }


def _host_peak() -> int:
    import resource

    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak` of `read_memory` anew. On the CPU this works where Linux allows it, else `peak` goes on."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear_refs:
            clear_refs.write("5")  # the high-water mark, see proc(5)
    except OSError:
        return


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU free: pages given back and asked for again have to be zeroed each time.

    That takes a tenth of a step of SD2.1 there. It holds for the whole process and has no inverse, so it is for
    programs to choose, not for libraries. `give_back_memory` gives back what is free. Other C libraries are
    left alone.
    """
    _call_libc("mallopt", _M_MMAP_MAX, 0)
    _call_libc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)  # bytes


def give_back_memory(device: torch.device) -> None:
    """Return to `device` what torch's allocator, or the C library, holds and does not use."""
    if device.type == "cpu":
        _call_libc("malloc_trim", 0)
    else:
        torch.get_device_module(device).empty_cache()


def _call_libc(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*numbers)
