"""`python -m emulator`: bad input is one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = [sys.executable, "-m", "emulator"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--soc", "Ascend1", "--", "true"], "no profile for the chip 'Ascend1'"),
        (["run", "--devices", "0", "--", "true"], "--devices 0: there must be at least one"),
        (["run"], "nothing to run: write the program after --"),
        (["report", "/no/such/file"], "No such file or directory"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m emulator run --soc Ascend310P3 --" in done.stdout
