"""The runtime around a model: devices and chips, memory, graphs, several devices.

It imports torch when a name of it is first used, see `ascend.device`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascend.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        return getattr(importlib.import_module("ascend.api"), name)
