"""Runs a program once for each device, as torchrun does, and says which rank failed, and how."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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

from ascend.device import narrow_visible_devices
from runners.cli import RankFailedError, UserError

FREE_PORT = "localhost:0"
MEETING_SECONDS = 600  # how long the first machine waits for the last
POLL_SECONDS = 0.01  # shorter than ranks take to fail because another did: the first to fail is named
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
LAST_LINES = 5  # of a failed rank's log


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
    defaults = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks)),
        "THP_MEM_ALLOC_ENABLE": "1",  # as in run_sd.py
    }
    logs_specs = DefaultLogsSpecs(str(log_dir), redirects={rank: Std.ALL for rank in range(1, ranks)})
    config = LaunchConfig(
        nproc_per_node=ranks,
        logs_specs=logs_specs,
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        **machines.rendezvous(),
    )
    try:
        # The ranks inherit the environment; torch's launcher replaces the handlers and leaves its own.
        with environment(defaults | dict(os.environ) | narrow_visible_devices(devices)), signal_handlers():
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


def result_of_ranks(devices: list[int], command: list[str]) -> Any:
    """Run `command` on all `devices`, a thread each unless the environment says another number.

    It gets `--output FILE` as well. The result is the JSON that rank 0 has written there. Raises as `launch` does.
    """
    with tempfile.TemporaryDirectory() as folder, environment({"OMP_NUM_THREADS": "1"} | dict(os.environ)):
        output = Path(folder, "result.json")
        launch(devices, Path(folder), [*command, "--output", str(output)])
        return json.loads(output.read_text())


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Let these be all environment variables; those before are back afterwards."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def signal_handlers() -> Iterator[None]:
    """The handlers of signals that end a process are afterwards what they were before."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


def describe(rank: int, failure: ProcessFailure, log_dir: Path) -> str:
    """Which rank failed first, how, and what it said."""
    code = failure.exitcode
    how = f"was ended by {failure.signal_name()}" if code < 0 else f"failed with exit code {code}"
    logs = log_dir.glob(f"*/attempt_0/{failure.local_rank}/stderr.log")
    log = max(logs, key=lambda path: path.stat().st_mtime_ns, default=None)  # earlier launches may have left others
    lines = log.read_text(errors="replace").strip().splitlines() if log else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = f": {' | '.join(errors or lines[-LAST_LINES:])}" if lines else ""
    return f"rank {rank} {how}, and the others have been ended{said}"
