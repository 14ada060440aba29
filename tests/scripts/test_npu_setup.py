"""scripts/test_npu_setup.py says what is wrong, and what to do about it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_npu_setup as setup

PROGRAM = Path(setup.__file__)


def run(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run([sys.executable, PROGRAM, "--json", *arguments], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in report["checks"]}


def test_a_host_without_an_npu_is_fine_unless_one_is_asked_for() -> None:
    code, checks = run("--device", "cpu")
    assert code == 0
    assert {"device", "attention", "convolution"} <= checks.keys()
    assert "CANN" not in checks
    code, checks = run("--device", "npu")
    assert code == 1
    assert checks["torch_npu"]["status"] == setup.FAILURE
    assert "requirements-npu.txt" in checks["torch_npu"]["hint"]


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "torch_npu": "2.12.0", "diffusers": "0.42.1"}
    monkeypatch.setattr(setup, "version_of", installed.get)
    assert "pip install torch_npu==2.13.0" in setup.check_torch_npu().hint
    assert setup.check_fork().hint == "bash apply_patch.sh"
    assert "numpy missing" in setup.check_requirements().found


def test_cann_is_found_by_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert setup.check_cann().status == setup.ABSENT
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    assert setup.check_cann().status == setup.FAILURE
    (tmp_path / "ascend_toolkit_install.info").write_text("package_name=x\nversion=9.1.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert setup.check_cann().found.startswith("9.1.0 in")
