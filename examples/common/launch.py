"""Runs a script once for each device, as torchrun does, and says in one line which rank failed.

    python examples/common/launch.py --device_list 0,1 -- examples/sd2.1/run_sd.py --FA --prompt "..."

The rendezvous takes a free port by itself. Rank 0 writes to the terminal, the others to files of their own. When a
rank fails, the others are ended, and the exit code is the one of the rank that failed first.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import VISIBLE_DEVICES
from examples.common.cli import FAILED, INTERRUPTED, ArgumentParser, fail

LAST_LINES = 5  # of a failed rank's log


def device_list(text: str) -> list[int]:
    try:
        devices = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1") from None
    if min(devices) < 0 or len(set(devices)) != len(devices):
        raise argparse.ArgumentTypeError(f"{text!r} must name each device once")
    return devices


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device_list", type=device_list, required=True, metavar="0,1", help="devices to use, a process on each")
    add("--log_dir", type=Path, metavar="DIR", help="where the other ranks' output goes (a new temporary folder)")
    add("command", nargs="+", metavar="-- SCRIPT ...", help="the script and its arguments")
    return parser.parse_args()


def launch(devices: list[int], log_dir: Path, command: list[str]) -> None:
    """Run `command` on all `devices` until all ranks are done.

    Raises:
        ChildFailedError: a rank failed; the others have been ended.
    """
    ranks = len(devices)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `describe` says it in one line
    for variable in VISIBLE_DEVICES.values():
        os.environ[variable] = ",".join(map(str, devices))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        logs_specs=DefaultLogsSpecs(str(log_dir), redirects={rank: Std.ALL for rank in range(1, ranks)}),
        max_restarts=0,
    )
    elastic_launch(config, sys.executable)("-u", *command)


def describe(error: ChildFailedError, log_dir: Path) -> tuple[str, int]:
    """Which rank failed first, how, and its exit code; a signal gives 128 and its number, as in a shell."""
    _, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was ended by {failure.signal_name()}" if code < 0 else f"failed with exit code {code}"
    logs = sorted(log_dir.glob(f"*/attempt_0/{failure.local_rank}/stderr.log"))
    lines = logs[-1].read_text(errors="replace").strip().splitlines() if logs else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = f": {' | '.join(errors or lines[-LAST_LINES:])}" if lines else ""
    return f"rank {failure.local_rank} {how}, and the others have been ended{said}", 128 - code if code < 0 else code


def main() -> None:
    arguments = parse_arguments()
    log_dir = arguments.log_dir or Path(tempfile.mkdtemp(prefix="diffusers-npu-"))
    try:
        launch(arguments.device_list, log_dir, arguments.command)
    except ChildFailedError as error:
        fail(*describe(error, log_dir))
    except SignalException as error:
        fail("interrupted", INTERRUPTED if error.sigval == 2 else FAILED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


if __name__ == "__main__":
    main()
