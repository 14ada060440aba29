"""The training under Ray Train: two workers have the losses of one process, and say what is wrong in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.programs import ROOT, environment
from tests.training_work import arguments, losses, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="requirements-training.txt"),
]
PROGRAM = ROOT / "examples/training/train_on_ray.py"


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *words]
    return subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)


def test_two_workers_have_the_losses_of_one(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    one = train(pictures, small_sd_dir, tmp_path / "one", steps=4)
    done = run(arguments(pictures, small_sd_dir, tmp_path / "two", "--batch_size", 1, steps=4))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-4, atol=0)


def test_what_is_wrong_is_one_line(small_sd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(arguments(tmp_path / "empty", small_sd_dir, tmp_path / "made"))
    assert done.returncode == 2
    assert "holds no picture" in done.stderr.splitlines()[-1]
