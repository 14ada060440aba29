"""What a process must do before it imports torch and diffusers."""

import os

from runners.messages import hide_known_messages


def prepare() -> None:
    """Set what torch reads when it is imported, unless the environment does, and hide what diffusers says then."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # without CANN it would end in a traceback there
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, which diffusers imports if it is there
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages on the CPU: processes hold each other up less
    hide_known_messages()
