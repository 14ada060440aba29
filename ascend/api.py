"""What `ascend` offers."""

from ascend.device import (
    DeviceError,
    DeviceManager,
    device_summary,
    find_device,
    get_device_info,
    memory_cleanup,
    memory_report,
)
from ascend.graphs.compile import compile_module, compile_pipeline, decompile_module, decompile_pipeline
from ascend.memory import keep_freed_memory
from ascend.parallel import Mesh, ParallelError, process_group, share_guidance, unshare_guidance
from ascend.placement import place_pipeline

__all__ = [
    "DeviceError",
    "DeviceManager",
    "Mesh",
    "ParallelError",
    "compile_module",
    "compile_pipeline",
    "decompile_module",
    "decompile_pipeline",
    "device_summary",
    "find_device",
    "get_device_info",
    "keep_freed_memory",
    "memory_cleanup",
    "memory_report",
    "place_pipeline",
    "process_group",
    "share_guidance",
    "unshare_guidance",
]
