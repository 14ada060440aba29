"""One view of the devices: Ascend NPU, then CUDA GPU, then CPU.

Looking for devices never raises. Asking for one that is absent raises `DeviceError`, which says why it is absent.

Where torch_npu is installed and CANN is not, `import torch` itself fails, before anything here can tell why, unless
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` is in the environment.
"""

from __future__ import annotations

import functools
import os
import random
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ascend.chips import family_of
from ascend.memory import give_back_memory, read_memory, reset_peak_memory
from ascend.placement import load_safetensors, place_pipeline

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
    return _device_count("npu") > 0


def get_accelerator_type() -> str:
    """The best type of device of this machine: `"npu"`, `"cuda"` or `"cpu"`."""
    return next(kind for kind in DEVICE_TYPES if _device_count(kind))


def get_all_devices() -> list[torch.device]:
    """Every device of this machine, the best first."""
    return [
        torch.device(kind) if kind == "cpu" else torch.device(kind, index)
        for kind in DEVICE_TYPES
        for index in range(_device_count(kind))
    ]


def _device_count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "npu" and _torch_npu_failure():
        return 0
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


@functools.cache
def get_chip(device: torch.device) -> str | None:
    """The NPU's chip as CANN names it, such as `"Ascend310P3"`; None for any other device.

    Code that is compiled calls it through `torch.compiler.assume_constant_result`: dynamo cannot trace torch_npu here.
    """
    return torch.get_device_module(device).get_device_name(device) if device.type == "npu" else None


def get_device_info(device: torch.device | None = None) -> dict[str, Any]:
    """What there is to know of `device` (default: the best) without computing on it.

    Returns:
        `type`, `index`, `name`, `chip`, `dtype` (the best one for inference), `count` (devices of that type) and
        `total_memory` in bytes.
    """
    device = device or _best_device()
    name = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {
        "type": device.type,
        "index": device.index,
        "name": name,
        "chip": get_chip(device),
        "dtype": best_dtype(device),
        "count": _device_count(device.type),
        "total_memory": read_memory(device)["total"],
    }


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float16 on other accelerators (Ascend 310P), float32 on the CPU."""
    if device.type == "cpu":
        return torch.float32
    family = family_of(get_chip(device))
    if family is not None:
        return family.dtypes[0]
    module = torch.get_device_module(device)
    emulation = {"including_emulation": False} if device.type == "cuda" else {}  # which torch_npu 2.10 does not take
    has_bfloat16 = module.is_bf16_supported(**emulation)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def get_memory_info(device: torch.device | None = None) -> dict[str, int]:
    """Memory of `device` (default: the best) in bytes, see `ascend.memory.read_memory`."""
    return read_memory(device or _best_device())


def set_seed(seed: int) -> None:
    """Seed the generators of Python, of NumPy where it is in use, and of torch on every device."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds the accelerators' default generators as well


def _best_device() -> torch.device:
    kind = get_accelerator_type()
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`: `"npu"`, `"cuda"`, `"cpu"`, or one of several as `"npu:1"`. None: the best there is.

    Raises:
        DeviceError: there is no such device.
    """
    if name is None:
        return _best_device()
    match = re.fullmatch(r"(npu|cuda|cpu)(?::(\d+))?", str(name))
    if match is None:
        raise DeviceError(f"device '{name}' is unknown: use npu, cuda or cpu, or one of several as npu:1")
    kind, index = match[1], int(match[2] or 0)
    count = _device_count(kind)
    if count == 0:
        raise DeviceError(f"device '{name}' is not there: {_absence(kind)}")
    if index >= count:
        raise DeviceError(f"device '{name}' is not there: this machine's last one is {kind}:{count - 1}")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def _absence(kind: str) -> str:
    """Why there is no device of type `kind`."""
    if kind == "npu" and (failure := _torch_npu_failure()):
        return failure
    reason = "torch_npu sees no NPU" if kind == "npu" else "torch sees no CUDA GPU"
    variable = VISIBLE_DEVICES[kind]
    return f"{reason} (with {variable}={os.environ[variable]})" if variable in os.environ else reason


def narrow_visible_devices(devices: Sequence[int]) -> dict[str, str]:
    """The variables that leave a child process only these of the devices that this one sees, by their numbers here.

    A scheduler (Slurm, Kubernetes, Ray) may have set them already; numbers then count within its value. One that hides
    all devices of a kind stays. The child numbers its devices from 0.

    Args:
        devices: ascending, as CANN refuses others for NPUs: EE2002, "configured in ascending order", in
            docs/en/error_code_ref of the public hicann/runtime.

    Raises:
        DeviceError: the numbers do not ascend, or name a device that is not visible.
    """
    if list(devices) != sorted(set(devices)):
        raise DeviceError(f"devices {_join(devices)}: CANN takes each device once, in ascending order")
    variables = {}
    for variable in VISIBLE_DEVICES.values():
        value = os.environ.get(variable)
        visible = value.split(",") if value else []
        if visible and devices[-1] >= len(visible):
            raise DeviceError(
                f"devices {_join(devices)}: {variable}={value} was set before, by a scheduler perhaps, and has no "
                f"device {devices[-1]}; numbers count within it, from 0 to {len(visible) - 1}"
            )
        if value != "":
            variables[variable] = ",".join(visible[device] for device in devices) if visible else _join(devices)
    return variables


def _join(devices: Sequence[int]) -> str:
    return ",".join(map(str, devices))


def _environment_device() -> torch.device:
    try:
        return find_device(os.environ.get("PREFERRED_DEVICE") or None)
    except DeviceError as error:
        raise DeviceError(f"PREFERRED_DEVICE: {error}") from None  # it may have been set long ago and elsewhere


@functools.cache
def _use_precompiled_kernels() -> None:
    npu = torch.get_device_module("npu")
    # 310P defaults to compiling every operator for every shape it meets, minutes for a first picture.
    npu.set_compile_mode(jit_compile=False)
    # And to convolutions with results in a private format, after which every operator is of the compiled kind again.
    npu.config.allow_internal_format = False


class DeviceManager:
    """The device that a program computes on, chosen once.

    Args:
        preferred_device: as for `find_device`; None takes the environment's `PREFERRED_DEVICE`, else the best device.

    Attributes:
        device: with its index, and made the current device.
        dtype: the best dtype for inference there, see `best_dtype`.

    Raises:
        DeviceError: there is no such device.
    """

    def __init__(self, preferred_device: str | torch.device | None = None) -> None:
        if preferred_device is None:
            self.device = _environment_device()
        else:
            self.device = find_device(preferred_device)
        if self.device.type == "npu":
            _use_precompiled_kernels()
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)
        self.dtype = best_dtype(self.device)

    def create_generator(self, seed: int) -> torch.Generator:
        """A seeded generator on the CPU: there a seed gives the same numbers whatever the device."""
        return torch.Generator().manual_seed(seed)

    def memory_stats(self) -> dict[str, int]:
        """Bytes, see `ascend.memory.read_memory`."""
        return read_memory(self.device)

    def reset_peak_memory(self) -> None:
        """See `ascend.memory.reset_peak_memory`."""
        reset_peak_memory(self.device)

    def empty_cache(self) -> None:
        """Return unused memory of the allocator to the device."""
        give_back_memory(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def load_safetensors(self, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
        """See `ascend.placement.load_safetensors`."""
        return load_safetensors(path, self.device)

    def set_memory_efficient_mode(self, pipe: Any) -> list[str]:
        """See `ascend.placement.place_pipeline`."""
        return place_pipeline(pipe, self.device)
