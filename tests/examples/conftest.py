from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from runners.stable_diffusion.run import main
from tests.programs import ROOT


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run_sd(
    tiny_sd_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """Runs the command line on the tiny model, on the CPU, with two steps and tmp_path/out, unless told otherwise."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def run(*arguments: object) -> Outcome:
        defaults = ["--model_path", tiny_sd_dir, "--output_dir", tmp_path / "out", "--device", "cpu", "--steps", 2]
        code = 0
        try:
            main("", ROOT / "examples/sd2.1", [str(argument) for argument in [*defaults, *arguments]])
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return run
