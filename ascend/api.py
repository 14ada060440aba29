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
from ascend.parallel import (
    Mesh,
    ParallelError,
    process_group,
    share_guidance,
    share_model,
    unshare_guidance,
    unshare_model,
)
from ascend.placement import place_pipeline
from ascend.planner import MemoryPlan, PlanError, apply_plan, plan_memory
from ascend.streaming import lend_module, stop_streaming, stream_module
from ascend.tiers import AdapterStore, Tier, TieredStore

__all__ = [
    "AdapterStore",
    "DeviceError",
    "DeviceManager",
    "MemoryPlan",
    "Mesh",
    "ParallelError",
    "PlanError",
    "Tier",
    "TieredStore",
    "apply_plan",
    "compile_module",
    "compile_pipeline",
    "decompile_module",
    "decompile_pipeline",
    "device_summary",
    "find_device",
    "get_device_info",
    "keep_freed_memory",
    "lend_module",
    "memory_cleanup",
    "memory_report",
    "place_pipeline",
    "plan_memory",
    "process_group",
    "share_guidance",
    "share_model",
    "stop_streaming",
    "stream_module",
    "unshare_guidance",
    "unshare_model",
]
