"""Runs a script once for each device, as torchrun does, and says in one line which rank failed.

    python examples/common/launch.py --device_list 0,1 -- examples/sd2.1/run_sd.py --FA --prompt "..."

The rendezvous takes a free port by itself; several machines need --nnodes, --node_rank and --rdzv_endpoint.
The first rank of a machine writes to the terminal, the others to files of their own. When a rank fails, the others are
ended, and the exit code is the one of the rank that failed first.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import narrow_visible_devices
from examples.common.cli import (
    ArgumentParser,
    RankFailedError,
    UserError,
    file_path,
    non_negative_int,
    one_line_errors,
    positive_int,
)

FREE_PORT = "localhost:0"
MEETING_SECONDS = 600  # how long the first machine waits for the last
POLL_SECONDS = 0.01  # shorter than ranks take to fail because another did: the first to fail is named
LAST_LINES = 5  # of a failed rank's log


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
    add("--log_dir", type=file_path, metavar="DIR", help="where the other ranks' output goes (a new temporary folder)")
    add("command", nargs="+", metavar="-- SCRIPT ...", help="the script and its arguments")
    arguments = parser.parse_args()
    if arguments.nnodes > 1 and arguments.rdzv_endpoint.endswith(":0"):
        parser.error(f"--nnodes {arguments.nnodes} needs --rdzv_endpoint HOST:PORT, the same on all machines")
    if arguments.node_rank >= arguments.nnodes:
        parser.error(f"--node_rank {arguments.node_rank} must be less than --nnodes, which is {arguments.nnodes}")
    return arguments


@dataclass(frozen=True)
class Machines:
    """How the machines of a run meet: at `endpoint` on the one with `node_rank` 0."""

    endpoint: str = FREE_PORT
    nnodes: int = 1
    node_rank: int = 0

    def rendezvous(self) -> dict[str, Any]:
        """LaunchConfig's arguments: torch's static rendezvous numbers machines as told, but takes no free port."""
        if self.nnodes == 1:
            meet = {"run_id": uuid.uuid4().hex, "rdzv_backend": "c10d", "rdzv_configs": {"is_host": True}}
        else:
            configs = {"rank": self.node_rank, "timeout": MEETING_SECONDS}
            meet = {"run_id": "diffusers-npu", "rdzv_backend": "static", "rdzv_configs": configs}
        return {"min_nodes": self.nnodes, "max_nodes": self.nnodes, "rdzv_endpoint": self.endpoint, **meet}


def launch(devices: list[int], log_dir: Path, command: list[str], machines: Machines = Machines()) -> None:
    """Run `command` on all `devices` of each machine until all ranks are done.

    Raises:
        RankFailedError: with the exit code of the first that failed; 128 and a signal's number, as in a shell.
        DeviceError: a device is not among those that this process sees.
        UserError: the port is taken, or not all machines came.
    """
    ranks = len(devices)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `describe` says it in one line
    os.environ.update(narrow_visible_devices(devices))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in run_sd.py
    logs_specs = DefaultLogsSpecs(str(log_dir), redirects={rank: Std.ALL for rank in range(1, ranks)})
    config = LaunchConfig(
        nproc_per_node=ranks,
        logs_specs=logs_specs,
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        **machines.rendezvous(),
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
        raise RankFailedError(describe(rank, failure, log_dir), code) from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise RankFailedError(
            f"the ranks were ended by {signal.Signals(error.sigval).name}", 128 + error.sigval
        ) from error
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        raise UserError(
            f"--rdzv_endpoint {machines.endpoint}: the ranks cannot meet there, as the port is taken or a machine did "
            f"not come: {error.__cause__ or error}"
        ) from error


def describe(rank: int, failure: ProcessFailure, log_dir: Path) -> str:
    """Which rank failed first, how, and what it said."""
    code = failure.exitcode
    how = f"was ended by {failure.signal_name()}" if code < 0 else f"failed with exit code {code}"
    logs = sorted(log_dir.glob(f"*/attempt_0/{failure.local_rank}/stderr.log"))
    lines = logs[-1].read_text(errors="replace").strip().splitlines() if logs else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = f": {' | '.join(errors or lines[-LAST_LINES:])}" if lines else ""
    return f"rank {rank} {how}, and the others have been ended{said}"


def main() -> None:
    arguments = parse_arguments()
    log_dir = arguments.log_dir or Path(tempfile.mkdtemp(prefix="diffusers-npu-"))
    machines = Machines(arguments.rdzv_endpoint, arguments.nnodes, arguments.node_rank)
    with one_line_errors():
        launch(arguments.device_list, log_dir, arguments.command, machines)


if __name__ == "__main__":
    main()
