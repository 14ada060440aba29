"""Says what a pipeline will take of a device's memory, and where its models are to be: nothing is loaded.

python -m ascend.planner MODEL_DIR --device npu --height 1024 --width 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ascend.device import DeviceError, best_dtype, find_device
from ascend.planner.calls import Request
from ascend.planner.memory_plan import MODES, plan_memory
from ascend.planner.plan import PlanError
from ascend.sizes import byte_size


class ArgumentParser(argparse.ArgumentParser):
    """Reports bad arguments as every other error."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help lists the options)")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not '{text}'")
    return int(text)


def image_size(text: str) -> int:
    size = positive_int(text)
    if size % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, not {size}")
    return size


def fail(message: object) -> NoReturn:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m ascend.planner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="a folder in diffusers' layout")
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(the device's best)")
    add("--height", type=image_size, default=512, metavar="PIXELS", help="multiple of 8 (512)")
    add("--width", type=image_size, default=512, metavar="PIXELS", help="multiple of 8 (512)")
    add("--batch", type=positive_int, default=1, metavar="N", help="pictures at a time (1)")
    add("--steps", type=positive_int, default=50, metavar="N", help="denoising steps (50)")
    add("--memory", choices=tuple(MODES), default="auto", help="where the denoiser is (auto)")
    add("--memory_limit", type=byte_size, metavar="SIZE", help="as 12GiB, of the device (what is free there)")
    add("--FA", action="store_true", help="attention in a fused kernel")
    add("--json", action="store_true", help="for programs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        device = find_device(args.device)
        dtype = getattr(torch, args.dtype) if args.dtype else best_dtype(device)
        request = Request(args.height, args.width, args.batch)
        fused = True if args.FA else None
        plan = plan_memory(args.model, device, request, dtype, args.steps, args.memory, args.memory_limit, fused)
    except (DeviceError, PlanError, OSError, ValueError) as error:
        fail(error)
    print(plan.to_json() if args.json else plan.table())


if __name__ == "__main__":
    main()
