"""Ray on this machine: what its processes need, and a cluster for one program."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ascend.device import get_all_devices

PACKAGES = Path(__file__).resolve().parents[1]  # where a worker finds them, too
RESOURCES = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}  # as Ray calls them
RAY_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
OBJECT_STORE_BYTES = 200 * 2**20  # of what goes from one process to another


def quiet_ray() -> None:
    """Before it is imported: no statistics over the network, and no error for each start of a worker."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def worker_environment() -> dict[str, str]:
    """What Python needs in a worker's environment: it has to find the modules that this script comes with."""
    paths = [str(PACKAGES), os.environ.get("PYTHONPATH")]
    inherited = {name: os.environ[name] for name in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "THP_MEM_ALLOC_ENABLE")}
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **inherited}


def count_devices(kind: str) -> int:
    return [device.type for device in get_all_devices()].count(kind)


def start_ray(ray: Any, kind: str, cpus: float) -> None:
    """Start a cluster of this machine alone, with its devices of one kind. It ends with this process, even killed."""
    logging.getLogger("ray._private.accelerators.npu").setLevel(logging.CRITICAL)  # misses CANN's acl with a traceback
    os.environ.update(worker_environment())
    ray.init(
        "local",
        num_cpus=cpus,
        num_gpus=count_devices(kind) if kind == "cuda" else 0,
        resources={"NPU": count_devices(kind)} if kind == "npu" else {},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **RAY_OPTIONS,
    )
