"""Where a runner computes, and in which precision."""

import argparse
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from ascend.device import DeviceManager, get_accelerator_type, get_chip
from ascend.parallel import world_size
from ascend.planner import MODES
from ascend.sizes import byte_size
from runners.cli import ArgumentParser, UserError, non_negative_int
from runners.report import Report

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_device_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("where to compute").add_argument
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    rank = os.environ.get("LOCAL_RANK")
    add("--local_rank", type=non_negative_int, default=rank, metavar="N", help="number of the device ($LOCAL_RANK)")
    add("--dtype", choices=DTYPES, help="(the device's best)")
    add_memory_arguments(add)
    add("--soc_version", metavar="CHIP", help="stop unless the NPU is this one, as Ascend310P3")


def add_memory_arguments(add: Callable[..., object]) -> None:
    add(
        "--memory",
        choices=tuple(MODES),
        default="auto",
        help="where the weights of what denoises are: on the device (resident), or with the host (stream) or on disk "
        "and brought block by block; auto is what fits and is fastest (auto)",
    )
    add("--memory_limit", type=byte_size, metavar="SIZE", help="as 12GiB, of the device (what is free there)")


def choose_device(args: argparse.Namespace, report: Report) -> DeviceManager:
    """The device that the arguments ask for, else the best one.

    Raises:
        DeviceError: there is no such device.
        UserError: the arguments contradict each other or the chip.
    """
    name = args.device
    if args.local_rank is not None:
        kind, _, number = (name or os.environ.get("PREFERRED_DEVICE") or get_accelerator_type()).partition(":")
        if number and number != str(args.local_rank):
            raise UserError(f"--device {name} and local rank {args.local_rank} name different devices")
        if kind != "cpu":
            name = f"{kind}:{args.local_rank}"
        elif args.local_rank > 0 and world_size() == 1:
            report.warn(f"local rank {args.local_rank} has no effect on the CPU")
    manager = DeviceManager(name)
    if args.soc_version:
        check_chip(args.soc_version, manager.device, report)
    return manager


def check_chip(wanted: str, device: torch.device, report: Report) -> None:
    """Raise UserError unless `device` is a chip of the series `wanted`: Ascend310P3, 310P3 or 310P."""
    chip = get_chip(device)
    if chip is None:
        report.warn(f"--soc_version {wanted} has no effect: the device is {device}, not an NPU")
    elif not chip.lower().removeprefix("ascend").startswith(wanted.lower().removeprefix("ascend")):
        raise UserError(f"--soc_version {wanted}: {device} is {chip}")


def choose_dtype(args: argparse.Namespace, manager: DeviceManager, report: Report) -> torch.dtype:
    """--dtype, else the device's own choice. Raises UserError for bfloat16 on a chip without it, as Ascend310P."""
    dtype = DTYPES[args.dtype] if args.dtype else manager.dtype
    on_cpu = manager.device.type == "cpu"
    if dtype == torch.bfloat16 and not on_cpu and not torch.get_device_module(manager.device).is_bf16_supported():
        raise UserError(f"--dtype bfloat16: {manager.device} cannot compute in it; use float16")
    if dtype == torch.float16 and on_cpu:
        report.warn("float16 is slow on the CPU; float32 is faster")
    return dtype


def check_compiler(device: torch.device) -> None:
    """Inductor writes C++ and builds it against Python's headers; torchair, on NPUs, does not."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "npu":
        return
    if shutil.which(compiler) is None:
        raise UserError(f"--dynamo compiles C++ and there is no '{compiler}': install g++ or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError(
            "--dynamo compiles C++ and Python.h is missing: install Python's headers (Debian: python3-dev)"
        )
