"""Runs a script once for each device, as torchrun does, and says in one line which rank failed.

    python examples/launch.py --device_list 0,1 -- examples/sd2.1/run_sd.py --FA --prompt "..."

The rendezvous takes a free port by itself; several machines need --nnodes, --node_rank and --rdzv_endpoint.
The first rank of a machine writes to the terminal, the others to files of their own. When a rank fails, the others are
ended, and the exit code is the one of the rank that failed first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, file_path, non_negative_int, one_line_errors, positive_int
from runners.launch import FREE_PORT, Machines, launch


def device_list(text: str) -> list[int]:
    try:
        devices = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1") from None
    if min(devices) < 0 or devices != sorted(set(devices)):
        raise argparse.ArgumentTypeError(
            f"{text!r} must name each device once, in ascending order, as CANN wants them"
        )
    return devices


def endpoint(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a host and a port such as localhost:29400")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device_list", type=device_list, required=True, metavar="0,1", help="devices to use, a process on each")
    add(
        "--rdzv_endpoint",
        type=endpoint,
        default=FREE_PORT,
        metavar="HOST:PORT",
        help="where the ranks meet, on machine 0 (a free port)",
    )
    add("--nnodes", type=positive_int, default=1, metavar="N", help="machines, each with as many devices (1)")
    add("--node_rank", type=non_negative_int, default=0, metavar="N", help="which of the machines this one is (0)")
    add(
        "--log_dir",
        type=file_path,
        metavar="DIR",
        help="where the other ranks' output goes (a temporary folder, kept if one fails)",
    )
    add("command", nargs="+", metavar="-- SCRIPT ...", help="the script and its arguments")
    arguments = parser.parse_args()
    if arguments.nnodes > 1 and arguments.rdzv_endpoint.endswith(":0"):
        parser.error(f"--nnodes {arguments.nnodes} needs --rdzv_endpoint HOST:PORT, the same on all machines")
    if arguments.node_rank >= arguments.nnodes:
        parser.error(f"--node_rank {arguments.node_rank} must be less than --nnodes, which is {arguments.nnodes}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    log_dir = arguments.log_dir or Path(tempfile.mkdtemp(prefix="diffusers-npu-"))
    machines = Machines(arguments.rdzv_endpoint, arguments.nnodes, arguments.node_rank)
    with one_line_errors():
        launch(arguments.device_list, log_dir, arguments.command, machines)
        if arguments.log_dir is None:
            shutil.rmtree(log_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
