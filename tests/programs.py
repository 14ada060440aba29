"""Programs that tests start."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Run = tuple[Sequence[object], Mapping[str, str]]  # a program with its arguments, and what changes in its environment


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file of this process or of its children can have more bytes: writes fail as on a full disk.

    Children that are no Python are ended by SIGXFSZ.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, in which Python finds this repository's packages."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **changes}


def run_forked(
    runs: Sequence[Run], imports: Sequence[str], variables: Mapping[str, str] = os.environ
) -> list[subprocess.CompletedProcess[str]]:
    """Runs programs one after the other, forked from a process that has done nothing but `imports`.

    Those take longer than the programs.
    """
    with tempfile.TemporaryDirectory() as folder:
        forks = [([*map(str, line)], dict(more), f"{folder}/{number}") for number, (line, more) in enumerate(runs)]
        command = [sys.executable, ROOT / "tests/fork_programs.py", json.dumps([imports, forks])]
        server = subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        return [
            subprocess.CompletedProcess(
                line, int(code), *(Path(f"{output}.{end}").read_text() for end in ("out", "err"))
            )
            for (line, _, output), code in zip(forks, server.stdout.split(), strict=True)
        ]
