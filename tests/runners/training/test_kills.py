"""Trainings that are killed at any moment, again and again, end at the weights of one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import environment
from tests.training_work import PROGRAM, adapter, arguments, losses, same

KILLS, STEPS = 20, 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_nothing(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    def start(output: Path) -> subprocess.Popen[bytes]:
        words = arguments(pictures, small_sd_dir, output, "--resume", "--keep_checkpoints", 2, steps=STEPS)
        return subprocess.Popen([sys.executable, str(PROGRAM), *words], env=environment(OMP_NUM_THREADS="1"))

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    alone = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        with start(tmp_path / "made") as running:
            try:
                running.wait(rng.uniform(0.3, 1.0) * alone)
            except subprocess.TimeoutExpired:
                running.kill()
                kills += 1
                continue
        assert running.returncode == 0
        # It was done before it could be killed: the last checkpoints go, and it has to make them again.
        for checkpoint in sorted((tmp_path / "made/checkpoints").iterdir())[1:]:
            checkpoint.rename(tmp_path / f"{kills}-{checkpoint.name}")
        kills += 1
    assert start(tmp_path / "made").wait() == 0
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "made"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "made")
    assert not [path for path in (tmp_path / "made/checkpoints").iterdir() if path.name.startswith(".")]
