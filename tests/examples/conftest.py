import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def run_sd_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_sd", ROOT / "examples" / "sd2.1" / "run_sd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_sd(
    run_sd_module: ModuleType,
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
            run_sd_module.main([str(argument) for argument in [*defaults, *arguments]])
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return run
