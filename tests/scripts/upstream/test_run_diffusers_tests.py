import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.upstream.run_diffusers_tests import FILES
from tests.scripts.fork.sandbox import ROOT, write_files

SUITE = """
import pytest, diffusers

def test_that_passes(): pass
def test_that_fails(): assert diffusers.number == 1, "the number is wrong"
def test_that_skips(): pytest.skip("needs a GPU")
@pytest.fixture
def broken(): raise OSError("no hub")
def test_that_errs(broken): pass
"""
NAME = FILES[0].removesuffix(".py").replace("/", ".")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout whose src/ must not be what is tested."""
    checkout = tmp_path / "checkout"
    write_files(checkout, {str(Path(name).with_name("__init__.py")): "" for name in FILES})
    write_files(checkout, {name: "" for name in FILES} | {FILES[0]: SUITE})
    write_files(checkout, {"src/diffusers/__init__.py": "raise RuntimeError('imported from the checkout')\n"})
    return checkout


def run(source: Path, number: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    installed = source.parent / f"installed {number}"
    write_files(installed, {"diffusers/__init__.py": f"__version__ = 'v{number}'\nnumber = {number}\n"})
    command = [
        sys.executable,
        ROOT / "scripts/upstream/run_diffusers_tests.py",
        "--online",
        "--source",
        source,
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)


def test_outcomes_are_written_and_compared(source: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert run(source, 1, "--output", before).returncode == 0
    result = run(source, 2, "--output", after, "--compare", before)
    assert result.returncode == 1
    assert f"{NAME}::test_that_fails: passed -> failed AssertionError: the number is wrong" in result.stdout
    assert "diffusers v1 -> v2: 1 tests passed before and do not now" in result.stdout
    assert json.loads(before.read_text())["counts"] == {"failed": 1, "passed": 2, "skipped": 1}
    outcomes = json.loads(after.read_text())
    assert outcomes["path"] == str(source.parent / "installed 2" / "diffusers")
    assert outcomes["tests"][f"{NAME}::test_that_skips"] == {"outcome": "skipped", "reason": "needs a GPU"}
    assert "no hub" in outcomes["tests"][f"{NAME}::test_that_errs"]["reason"]
    assert run(source, 2, "--output", before, "--compare", after).returncode == 0


def test_a_folder_that_is_no_checkout_is_refused(source: Path, tmp_path: Path) -> None:
    source.joinpath(FILES[1]).unlink()
    result = run(source, 1, "--output", tmp_path / "out.json")
    assert (result.returncode, FILES[1] in result.stderr, "Traceback" in result.stderr) == (1, True, False)


def test_a_suite_that_cannot_be_collected_is_no_result(source: Path, tmp_path: Path) -> None:
    write_files(source, {FILES[1]: "import no_such_module\n"})
    result = run(source, 1, "--output", tmp_path / "out.json")
    assert (result.returncode, "exit code 2" in result.stderr) == (1, True)
    assert not tmp_path.joinpath("out.json").exists()
