"""Each program explains itself, from whatever folder it is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

PROGRAMS = sorted(
    path
    for folder in ("scripts", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and path.name != "gather.py"  # which ranks alone start
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_teaches(program: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(program), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
