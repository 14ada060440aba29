"""What `ascend.device` offers."""

from ascend.device.discovery import (
    DEVICE_TYPES,
    VISIBLE_DEVICES,
    DeviceError,
    default_device,
    find_device,
    get_accelerator_type,
    get_all_devices,
    is_npu_available,
)
from ascend.device.manager import DeviceManager, set_seed
from ascend.device.memory import get_memory_info, memory_cleanup, memory_report
from ascend.device.properties import best_dtype, get_chip, get_device_info, inference_dtypes
from ascend.device.summary import device_summary
from ascend.device.visible import narrow_visible_devices

__all__ = [
    "DEVICE_TYPES",
    "VISIBLE_DEVICES",
    "DeviceError",
    "DeviceManager",
    "best_dtype",
    "default_device",
    "device_summary",
    "find_device",
    "get_accelerator_type",
    "get_all_devices",
    "get_chip",
    "get_device_info",
    "get_memory_info",
    "inference_dtypes",
    "is_npu_available",
    "memory_cleanup",
    "memory_report",
    "narrow_visible_devices",
    "set_seed",
]
