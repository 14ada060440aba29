"""Checks this machine and environment, and says what to do about each thing that is wrong.

    python scripts/test_npu_setup.py                 the best device there is: NPU, then CUDA, then CPU
    python scripts/test_npu_setup.py --device npu    insist on an NPU
    python scripts/test_npu_setup.py --json          for programs

Exit codes: 0 everything that the device needs is right (there may be warnings), 1 something is wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# torch must import even where torch_npu is installed and broken: saying so is what this program is for.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

OK, WARNING, FAILURE, ABSENT = "ok", "warning", "failure", "absent"
OLDEST_PYTHON = (3, 11)
DEVICE_NODES = "/dev/davinci[0-9]*"


@dataclass
class Result:
    """What a check found; `hint` says what to do when it is not right."""

    name: str
    status: str
    found: str
    hint: str = ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="test_npu_setup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="what is to work (the best device there is)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser.parse_args()


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


def check_requirements() -> Result:
    """Whether what is installed is what requirements.txt pins."""
    wrong = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = re.match(r"([\w.-]+)==([^\s#]+)", line)
        if requirement is None:
            continue
        installed = version_of(requirement[1])
        if installed is None or installed.split("+")[0] != requirement[2]:
            wrong.append(f"{requirement[1]} {installed or 'missing'} (pinned: {requirement[2]})")
    if wrong:
        return Result("requirements", FAILURE, ", ".join(wrong), "pip install -r requirements.txt")
    return Result("requirements", OK, "as pinned in requirements.txt")


def check_torch() -> Result:
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return Result("torch", FAILURE, first_line(error), "pip install -r requirements.txt")
    found = f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'} build"
    if torch.version.cuda and version_of("torch_npu"):
        hint = "torch_npu refuses a CUDA build: pip install torch==2.13.0 --index-url <PyTorch's index of CPU builds>"
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
        return Result("torch_npu", FAILURE, f"{version} does not load: {first_line(error)}", hint)
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


def check_computation(name: str | None) -> Iterator[Result]:
    """A small attention and a convolution on the device, against float32 on the CPU."""
    import torch
    import torch.nn.functional as F

    from ascend.device import DeviceManager
    from processors import attention

    manager = DeviceManager(name)
    generator = manager.create_generator(0)
    query, key, value = torch.randn(3, 1, 64, 128, generator=generator).unbind(0)
    image, weight = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(4, 8, 3, 3, generator=generator) / 9
    computations: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "attention": (functools.partial(attention, heads=2), (query, key, value)),
        "convolution": (functools.partial(F.conv2d, padding=1), (image, weight)),
    }
    for title, (function, inputs) in computations.items():
        try:
            there = function(*(tensor.to(manager.device, manager.dtype) for tensor in inputs)).float().cpu()
        except Exception as error:  # whatever a broken installation raises
            yield Result(
                title, FAILURE, first_line(error), "the device is there and cannot compute: check CANN's operators"
            )
            continue
        error_of = (there - function(*inputs)).abs().max().item()
        tolerance = 8 * torch.finfo(manager.dtype).eps
        if error_of > tolerance:
            hint = "the device computes wrongly: check that CANN, driver and firmware belong together"
            yield Result(title, FAILURE, f"differs from the CPU by {error_of:.2g}", hint)
        else:
            yield Result(title, OK, f"agrees with the CPU within {error_of:.1g} ({str(manager.dtype)[6:]})")


def emulated() -> bool:
    return "CANN_EMULATOR_SOC" in os.environ


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_checks(device: str | None) -> list[Result]:
    results = [check_python(), check_requirements(), check_torch(), check_fork()]
    npu_checks = [check_driver(), check_cann(), check_torch_npu()]
    if device == "npu":
        for result in npu_checks:
            result.status = FAILURE if result.status == ABSENT else result.status
    if device not in ("cuda", "cpu"):
        results += npu_checks
    if any(result.name in ("torch", "requirements") and result.status == FAILURE for result in results):
        return results
    results.append(check_device(device))
    if results[-1].status == OK:
        results += check_computation(device)
    return results


def main() -> int:
    arguments = parse_arguments()
    results = run_checks(arguments.device)
    failed = any(result.status == FAILURE for result in results)
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(result) for result in results]}, indent=2))
        return int(failed)
    for result in results:
        print(f"{result.status:8} {result.name:13} {result.found}")
        if result.status != OK and result.hint:
            print(f"{'':22} -> {result.hint}")
    print("Something is wrong: see the arrows above." if failed else "All that is needed is there.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
