"""What is installed on this machine and in this environment, and what to do about each thing that is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OK, WARNING, FAILURE, ABSENT = "ok", "warning", "failure", "absent"
OLDEST_PYTHON = (3, 11)
DEVICE_NODES = "/dev/davinci[0-9]*"


@dataclass
class Result:
    """What a check found; `hint` says what to do when it is not right, `details` are for whoever mends it."""

    name: str
    status: str
    found: str
    hint: str = ""
    details: str = ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Result:
    found = f"{platform.python_version()} on {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Result("Python", FAILURE, found, "install Python 3.11 or newer")
    return Result("Python", OK, found)


def chosen_torch() -> str | None:
    """What `setup_env.sh --torch` has chosen for this environment in place of the pinned version."""
    chosen = Path(sys.prefix, ".diffusers-npu.torch")
    return chosen.read_text(encoding="utf-8").strip() if chosen.exists() else None


def check_requirements() -> Result:
    """Whether what is installed is what requirements.txt pins, and the torch that setup_env.sh was told to take."""
    wrong = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = re.match(r"([\w.-]+)==([^\s#]+)", line)
        if requirement is None:
            continue
        installed = version_of(requirement[1])
        pinned = (chosen_torch() if requirement[1] == "torch" else None) or requirement[2]
        if installed is None or installed.split("+")[0] != pinned:
            wrong.append(f"{requirement[1]} {installed or 'missing'} (pinned: {pinned})")
    if wrong:
        return Result("requirements", FAILURE, ", ".join(wrong), "bash scripts/setup_env.sh")
    return Result("requirements", OK, "as pinned in requirements.txt")


def check_torch() -> Result:
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return Result("torch", FAILURE, first_line(error), "pip install -r requirements.txt")
    found = f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'} build"
    if torch.version.cuda and version_of("torch_npu"):
        version = torch.__version__.split("+")[0]
        hint = (
            f"torch_npu refuses a CUDA build: pip install torch=={version} --index-url <PyTorch's index of CPU builds>"
        )
        return Result("torch", WARNING, f"{found} beside torch_npu", hint)
    return Result("torch", OK, found)


def check_fork() -> Result:
    installed = version_of("diffusers")
    if installed is None:
        return Result("diffusers", FAILURE, "not installed", "bash apply_patch.sh")
    if "+npu." not in installed:
        return Result("diffusers", FAILURE, f"{installed}, not the patched fork", "bash apply_patch.sh")
    return Result("diffusers", OK, f"{installed}, the patched fork")


def check_driver() -> Result:
    nodes = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if nodes:
        return Result("NPU driver", OK, ", ".join(nodes))
    if emulated():
        return Result("NPU driver", OK, "none needed: the chip is emulated")
    hint = f"install the driver and firmware of the card; they make {DEVICE_NODES} (in a container: pass them in)"
    return Result("NPU driver", ABSENT, f"no {DEVICE_NODES}", hint)


def check_cann() -> Result:
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        return Result("CANN", ABSENT, "ASCEND_HOME_PATH is not set", "source set_env.sh of your CANN toolkit")
    if not Path(home).is_dir():
        return Result(
            "CANN", FAILURE, f"ASCEND_HOME_PATH={home} does not exist", "source set_env.sh of your CANN toolkit"
        )
    files = [*Path(home).glob("*install.info"), *Path(home).glob("version.info")]
    versions = [re.search(r"(?im)^version\s*=\s*(\S+)", path.read_text(errors="replace")) for path in files]
    found = next((match[1] for match in versions if match), "version unknown")
    return Result("CANN", OK, f"{found} in {home}" + (" (emulated)" if emulated() else ""))


def check_torch_npu() -> Result:
    torch_version, version = version_of("torch"), version_of("torch_npu")
    if version is None:
        return Result("torch_npu", ABSENT, "not installed", "pip install -r requirements-npu.txt")
    if torch_version and torch_version.split("+")[0] != version.split("+")[0]:
        hint = f"both must have the same version: pip install torch_npu=={torch_version.split('+')[0]}"
        return Result("torch_npu", FAILURE, f"{version} beside torch {torch_version}", hint)
    try:
        import torch_npu  # noqa: F401
    except Exception as error:  # ImportError, OSError, RuntimeError, or Exception itself
        hint = "source set_env.sh of your CANN toolkit: its libraries are not on the path"
        if "accelerators" in str(error):
            hint = "install the CPU build of torch beside torch_npu"
        return Result(
            "torch_npu", FAILURE, f"{version} does not load: {first_line(error)}", hint, traceback.format_exc()
        )
    return Result("torch_npu", OK, version)


def check_device(name: str | None) -> Result:
    from ascend.device import DeviceError, DeviceManager, get_device_info

    try:
        manager = DeviceManager(name)
    except DeviceError as error:
        return Result("device", FAILURE, str(error), "see the hints above")
    info = get_device_info(manager.device)
    memory = f"{info['total_memory'] / 2**30:.0f} GiB"
    found = f"{manager.device}: {info['name']}, {info['count']} of them, {memory}, best in {str(info['dtype'])[6:]}"
    return Result("device", OK, found)


def emulated() -> bool:
    return "CANN_EMULATOR_SOC" in os.environ


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
