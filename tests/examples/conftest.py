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


def load_script(name: str) -> ModuleType:
    """A script of examples/sd2.1, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "sd2.1" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_sd_module() -> ModuleType:
    return load_script("run_sd")


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
