"""Several ranks train to what one does, end together, and go on together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from runners.training.checkpoints import Checkpoints
from tests.programs import ROOT, environment
from tests.training_work import PROGRAM, adapter, arguments, losses, same, train

END_SECONDS = 4 * 30  # within which a killed rank has to end a run, on a machine four times slower
STEPS = 30


def launch(words: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "examples/launch.py"), "--device_list", "0,1", "--", str(PROGRAM), *words]


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--full", "--no-ema"), marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_two_ranks_have_the_losses_of_one(
    more: tuple[str, ...], pictures: Path, small_sd_dir: Path, tmp_path: Path
) -> None:
    one = train(pictures, small_sd_dir, tmp_path / "one", *more, steps=4)
    run(launch(arguments(pictures, small_sd_dir, tmp_path / "two", "--batch_size", 1, *more, steps=4)))
    # Gradients of half a batch each are summed in another order.
    torch.testing.assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_goes_on(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    whole, made = tmp_path / "whole", tmp_path / "made"
    run(launch(arguments(pictures, small_sd_dir, whole, "--batch_size", 1, steps=STEPS)))
    command = launch(arguments(pictures, small_sd_dir, made, "--batch_size", 1, "--resume", steps=STEPS))
    with subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1")) as running:
        while not Checkpoints(made / "checkpoints", 3).steps():
            assert running.poll() is None
            time.sleep(0.02)
        ranks = psutil.Process(running.pid).children(recursive=True)
        next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
        started = time.monotonic()
        assert running.wait() == 128 + signal.SIGKILL
        assert time.monotonic() - started < END_SECONDS
    assert Checkpoints(made / "checkpoints", 3).steps()[-1] < STEPS
    run(command)
    assert same(adapter(whole), adapter(made))
