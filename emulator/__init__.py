"""An emulator of the CANN libraries: the genuine torch_npu runs on a machine without an NPU."""


class EmulatorError(RuntimeError):
    """What a user can put right; the message says how."""
