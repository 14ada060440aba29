"""What diffusers' test suite needs to know of an NPU (its DIFFUSERS_TEST_DEVICE_SPEC)."""

import torch
import torch_npu  # noqa: F401  registers the device

npu = torch.get_device_module("npu")
# As ascend.device.DeviceManager does; upstream's tests do not use it.
npu.set_compile_mode(jit_compile=False)
npu.config.allow_internal_format = False
# Upstream compares float32 to 1e-4; it switches TF32 off on CUDA as well.
npu.conv.allow_hf32 = False

DEVICE_NAME = "npu"
MANUAL_SEED_FN = npu.manual_seed
EMPTY_CACHE_FN = npu.empty_cache
DEVICE_COUNT_FN = npu.device_count
RESET_PEAK_MEMORY_STATS_FN = npu.reset_peak_memory_stats
RESET_MAX_MEMORY_ALLOCATED_FN = npu.reset_max_memory_allocated
MAX_MEMORY_ALLOCATED_FN = npu.max_memory_allocated
SUPPORTS_TRAINING = False
