"""One view of the devices: Ascend NPU, then CUDA GPU, then CPU.

Looking for devices never raises. Asking for one that is absent raises `DeviceError`, which says why it is absent.
`python -m ascend.device` prints all of them.

Where torch_npu is installed and CANN is not, `import torch` itself fails, before anything here can tell why, unless
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` is in the environment. So that the program can put it there first, this package
imports torch when a name of it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascend.device.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        return getattr(importlib.import_module("ascend.device.api"), name)
