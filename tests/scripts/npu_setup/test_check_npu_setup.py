"""scripts/npu_setup/check_npu_setup.py says what is wrong, and what to do about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.npu_setup import bundle as bundles
from scripts.npu_setup import checks as setup
from scripts.npu_setup import trials

PROGRAM = Path(setup.__file__).with_name("check_npu_setup.py")


def run(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run([sys.executable, PROGRAM, "--json", *arguments], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in report["checks"]}


def test_a_host_without_an_npu_is_fine_unless_one_is_asked_for() -> None:
    code, checks = run("--device", "cpu")
    assert code == 0
    assert {"device", "attention to a prompt", "group norm with SiLU", "exact GELU", "convolution"} <= checks.keys()
    assert checks["attention"]["found"].startswith("scaled_dot_product_attention agrees with the CPU")
    assert checks["attention"]["found"].endswith(" ms")
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


def test_the_older_torch_is_right_where_it_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "version_of", lambda package: {"torch": "2.10.0+cpu"}.get(package))
    assert "torch 2.10.0+cpu (pinned: 2.13.0)" in setup.check_requirements().found
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / ".diffusers-npu.torch").write_text("2.10.0\n")
    assert "torch 2.10.0" not in setup.check_requirements().found


@pytest.mark.parametrize("wrong", [1.02, torch.nan])
def test_a_device_that_computes_wrongly_is_found_out(wrong: float) -> None:
    expected = torch.linspace(-4, 4, 100)
    assert trials.compare(expected.half(), expected, 0.1).status == setup.OK
    result = trials.compare((expected * wrong).half(), expected, 0.1)
    assert result.status == setup.FAILURE and "differs from the CPU" in result.found


def test_an_operator_that_fails_leaves_its_traceback_for_the_maintainer() -> None:
    def fails() -> setup.Result:
        raise RuntimeError("no kernel\nEZ1001: more")

    result = trials.attempt("attention", fails)
    assert (result.status, result.found) == (setup.FAILURE, "no kernel")
    assert "in fails" in result.details and "EZ1001" in result.details


def test_a_bundle_holds_what_a_maintainer_needs_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/home/somebody/cann/lib64")
    monkeypatch.setenv("TORCH_INDEX", "https://name:hunter2@host/simple")
    for name in ("HF_TOKEN", "ASCEND_SECRET", "TORCH_API_KEY", "PYTORCH_HTTP_PROXY"):
        monkeypatch.setenv(name, "hunter2")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "npu-smi").write_text('#!/bin/sh\necho "npu-smi $1: 310P3"\n')
    (tools / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    failed = setup.Result("attention", setup.FAILURE, "no kernel", details="Traceback of it")
    bundles.write(tmp_path / "bundle.json", bundles.collect([failed]))
    text = (tmp_path / "bundle.json").read_text()
    assert "hunter2" not in text and "somebody" not in text
    bundle = json.loads(text)
    assert bundle["environment"]["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert bundle["environment"]["LD_LIBRARY_PATH"] == "~/cann/lib64"
    assert bundle["packages"]["torch"] and bundle["machine"]["python"] == sys.version
    assert bundle["driver"]["npu-smi info"] == "npu-smi info: 310P3\n"
    assert bundle["results"][0]["details"] == "Traceback of it"
    assert [path.name for path in tmp_path.iterdir() if path != tools] == ["bundle.json"]


def test_a_bundle_that_cannot_be_written_is_one_line_before_any_check(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, "--bundle", tmp_path / "absent" / "bundle.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].endswith("its folder does not exist, or cannot be written to")
