import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fork.fork_wheel import ForkError
from scripts.upstream import run_npu_op_tests
from scripts.upstream.run_npu_op_tests import SELECTION, count, judge, select
from tests.scripts.fork.sandbox import ROOT, write_files

FAILED = {"outcome": "failed", "reason": "Mismatch"}
PASSED = {"outcome": "passed", "reason": ""}


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, Path]:
    for repository, folder, operators in SELECTION:
        write_files(tmp_path / repository, {f"{folder}/test_{operator}.py": "" for operator in operators.split()})
    return tmp_path / "op_plugin", tmp_path / "pytorch"


def test_files_are_named_by_repository_and_path(checkouts: tuple[Path, Path]) -> None:
    files = select(*checkouts, ["*"])
    name = "op_plugin/test/test_base_ops/test_abs.py"
    assert files[name] == checkouts[0] / "test/test_base_ops/test_abs.py"
    assert select(*checkouts, ["*/test_abs.py"]) == {name: files[name]}
    assert len(files) == sum(len(set(operators.split())) for _, _, operators in SELECTION)


def test_what_is_no_checkout_or_no_file_is_refused(checkouts: tuple[Path, Path]) -> None:
    op_plugin, pytorch = checkouts
    with pytest.raises(ForkError, match="no file fits"):
        select(op_plugin, pytorch, ["*/test_no_such_operator.py"])
    op_plugin.joinpath("test/test_base_ops/test_abs.py").unlink()
    with pytest.raises(ForkError, match="lacks 1 of .* as test/test_base_ops/test_abs.py"):
        select(op_plugin, pytorch, ["*"])


def test_only_a_failure_of_the_named_chip_is_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (("Ascend310*", "*::test_*bf16*", "no bfloat16"), ("*", "*.TestAdd::test_device*", "another text"))
    monkeypatch.setattr(run_npu_op_tests, "NOT_APPLICABLE", table)
    tests = {"a.TestAdd::test_bf16": FAILED, "a.TestAdd::test_device_check": FAILED, "a.TestSub::test_device": FAILED}
    excused = {"a.TestAdd::test_device_check": {"outcome": "not applicable", "reason": "another text"}}
    assert judge(tests, "Ascend910B3") == tests | excused
    assert judge(tests, "Ascend310P3")["a.TestAdd::test_bf16"]["reason"] == "no bfloat16"
    assert judge({"a.TestAdd::test_device": PASSED}, "Ascend910B3") == {"a.TestAdd::test_device": PASSED}
    assert count(judge(tests, "Ascend310P3")) == {"passed": 0, "failed": 1, "not applicable": 2, "skipped": 0}


def test_bad_input_is_one_line(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    script = ROOT / "scripts/upstream/run_npu_op_tests.py"
    command = [sys.executable, script, "--op_plugin", tmp_path, "--pytorch", checkouts[1]]
    for arguments, code in (((), 2), (("--output", tmp_path / "out.json"), 1)):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
        assert (result.returncode, len(result.stderr.splitlines())) == (code, 1)
        assert result.stderr.startswith("run_npu_op_tests.py: ")
