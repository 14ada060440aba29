"""Starts programs of several ranks, and collects what each writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.on_npu.hccl_ranks import PATIENCE, Results
from tests.programs import environment


def run_ranks(script: str, program: str, size: int, directory: Path, **variables: str) -> list[Results | None]:
    """What each rank of the program in `script` got; None for one that did not come to its end."""
    directory.mkdir(exist_ok=True)
    with (directory / "output").open("w") as output:
        command = [sys.executable, script, program, str(size), str(directory)]
        several = environment(**{"TASK_QUEUE_ENABLE": "0", **variables})
        ranks = subprocess.Popen(command, env=several, stdout=output, stderr=output, start_new_session=True)
        try:
            ranks.wait(timeout=PATIENCE)
        finally:
            if ranks.poll() is None:
                os.killpg(ranks.pid, signal.SIGKILL)
    files = [directory / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file) if file.exists() else None for file in files]


def whole(results: list[Results | None], directory: Path) -> list[Results]:
    found = [result for result in results if result is not None]
    assert len(found) == len(results), (directory / "output").read_text()[-4000:]
    return found
