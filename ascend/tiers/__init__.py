"""Tensors in more memory than a device has: on the device, in host memory, and in files.

Who knows the `VGPUStack` of APT-Transformer finds here:

| there | here |
| --- | --- |
| `create_vgpu_stack()` | `default_store(device, folder)`, with the same budgets |
| `VGPUStack({"levels": [...]})`, `VGPULevel(level, capacity_mb, device)` | `TieredStore([Tier(place, budget), ...])` |
| `register(key, tensor, priority=5)` | `put(key, tensor, priority=5)` |
| `access(key)`, None where there is none | `get(key)`, `KeyError` where there is none |
| `prefetch(keys)` | `prefetch(keys)`, which returns before the copies end |
| `VGPULevel.remove(key)` | `remove(key)` |
| `get_stats()`, `print_stats()` | `stats()`, bytes instead of megabytes |
| `transfer_speed_gbps`, `speed_gbps` | nothing: it was kept and not used |
| `VGPUStackLinear` | nothing: `put` the detached weight, and `get` it where a layer runs |
"""

from ascend.tiers.adapters import AdapterStore
from ascend.tiers.media import DamagedFileError, TierError
from ascend.tiers.store import Tier, TieredStore, default_store

__all__ = ["AdapterStore", "DamagedFileError", "Tier", "TierError", "TieredStore", "default_store"]
