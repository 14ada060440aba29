"""Which of the devices a child process is to see."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ascend.device.discovery import VISIBLE_DEVICES, DeviceError


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
