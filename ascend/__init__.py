"""The runtime around a model: devices and chips, memory, graphs, several devices."""

from ascend.device import DeviceError, DeviceManager, find_device, get_device_info
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
    "find_device",
    "get_device_info",
    "keep_freed_memory",
    "place_pipeline",
    "process_group",
    "share_guidance",
    "unshare_guidance",
]
