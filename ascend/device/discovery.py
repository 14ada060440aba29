"""Which devices this machine has, the best first, and why it lacks the others."""

from __future__ import annotations

import functools
import os
import re
import sys

import torch

DEVICE_TYPES = ("npu", "cuda", "cpu")  # best first
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


class DeviceError(RuntimeError):
    """A device was asked for that this machine does not have."""


@functools.cache
def _torch_npu_failure() -> str | None:
    """Why torch_npu cannot be used, in one line, or None when it can.

    Without CANN's libraries its import raises ImportError or OSError; beside a CUDA build of torch, RuntimeError; with
    a wrong ASCEND_HOME_PATH or ASCEND_OPP_PATH, Exception itself.
    """
    try:
        import torch_npu  # noqa: F401
    except Exception as error:
        return _describe_failure(_hidden_failure() or error)
    return None


def _hidden_failure() -> Exception | None:
    """What diffusers met when it imported torch_npu; it then puts None there, and all further imports find nothing."""
    is_hidden = sys.modules.get("torch_npu", sys) is None
    kept = getattr(sys.modules.get("diffusers.utils.import_utils"), "torch_npu_import_error", None)
    return kept() if is_hidden and kept else None


def _describe_failure(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        if error.name == "torch_npu":
            return "torch_npu is not installed"
        return f"torch_npu needs the module {error.name}, which is not installed"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # an error code and the time follow
    hint = "; has CANN's set_env.sh been sourced?" if "cannot open shared object" in reason else ""
    return f"torch_npu does not load ({reason}){hint}"


def is_npu_available() -> bool:
    """Whether torch_npu loads and sees at least one NPU."""
    return device_count("npu") > 0


def get_accelerator_type() -> str:
    """The best type of device of this machine: `"npu"`, `"cuda"` or `"cpu"`."""
    return next(kind for kind in DEVICE_TYPES if device_count(kind))


def get_all_devices() -> list[torch.device]:
    """Every device of this machine, the best first."""
    return [
        torch.device(kind) if kind == "cpu" else torch.device(kind, index)
        for kind in DEVICE_TYPES
        for index in range(device_count(kind))
    ]


def device_count(kind: str) -> int:
    """How many devices of one of the `DEVICE_TYPES` this process sees; the CPU is one."""
    if kind == "cpu":
        return 1
    if kind == "npu" and _torch_npu_failure():
        return 0
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`: `"npu"`, `"cuda"`, `"cpu"`, or one of several as `"npu:1"`. None: the best there is.

    Raises:
        DeviceError: there is no such device.
    """
    if name is None:
        return get_all_devices()[0]
    match = re.fullmatch(r"(npu|cuda|cpu)(?::(\d+))?", str(name))
    if match is None:
        raise DeviceError(f"device '{name}' is unknown: use npu, cuda or cpu, or one of several as npu:1")
    kind, index = match[1], int(match[2] or 0)
    count = device_count(kind)
    if count == 0:
        raise DeviceError(f"device '{name}' is not there: {why_absent(kind)}")
    if index >= count:
        raise DeviceError(f"device '{name}' is not there: this machine's last one is {kind}:{count - 1}")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def default_device() -> torch.device:
    """The device that the environment's `PREFERRED_DEVICE` names, else the best there is.

    Raises:
        DeviceError: there is no device of that name.
    """
    try:
        return find_device(os.environ.get("PREFERRED_DEVICE") or None)
    except DeviceError as error:
        raise DeviceError(f"PREFERRED_DEVICE: {error}") from None  # it may have been set long ago and elsewhere


def why_absent(kind: str) -> str:
    """Why there is no device of type `kind`, in one line."""
    if kind == "npu" and (failure := _torch_npu_failure()):
        return failure
    if kind == "cuda" and not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    reason = "torch_npu sees no NPU" if kind == "npu" else "torch sees no CUDA GPU"
    variable = VISIBLE_DEVICES[kind]
    return f"{reason} (with {variable}={os.environ[variable]})" if variable in os.environ else reason
