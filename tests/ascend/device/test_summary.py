"""`device_summary` and `python -m ascend.device`, which prints it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend.device import device_summary, get_all_devices
from ascend.device.discovery import why_absent
from tests.programs import environment

MIB = 2**20


def run_program(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """`python -m ascend.device` as a user has it, where no variable keeps torch from loading torch_npu."""
    variables = environment(**changes)
    variables.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "ascend.device", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_there_is_one_order_whatever_is_asked(run_with_accelerators: Callable[..., Any]) -> None:
    code = """
from ascend.device import *
result = [get_accelerator_type(), str(find_device()), str(default_device()), device_summary()["preferred"],
          get_device_info()["type"], *device_summary()["devices"]]
"""
    assert run_with_accelerators(code, PREFERRED_DEVICE="") == [
        "npu", "npu:0", "npu:0", "npu:0", "npu", "npu:0", "npu:1", "cuda:0", "cpu",
    ]  # fmt: skip


def test_what_devices_answer_is_what_the_summary_says(run_with_accelerators: Callable[..., Any]) -> None:
    said = run_with_accelerators("from ascend.device import device_summary; result = device_summary()")
    assert (said["total_devices"], said["npu_devices"], said["cuda_devices"]) == (4, 2, 1)
    assert said["absent"] == {}
    second = said["devices"]["npu:1"]
    assert (second["name"], second["chip"]) == ("Ascend310P3", "Ascend310P3")
    assert second["dtypes"] == ["float16", "float32"]
    assert second["memory"] == {
        "total": 42 * MIB, "free": 14 * MIB, "allocated": 2 * MIB, "reserved": 3 * MIB, "peak": 4 * MIB,
    }  # fmt: skip
    assert said["devices"]["cuda:0"]["chip"] is None


def test_a_device_that_does_not_answer_is_said_so_and_hides_no_other(
    run_with_accelerators: Callable[..., Any],
) -> None:
    code = """
from ascend.device import device_summary
def refuse(device):
    raise RuntimeError("the device is taken\\n[ERROR] 507033")
torch.cuda.mem_get_info = refuse
result = device_summary()["devices"]
"""
    said = run_with_accelerators(code)
    assert said["cuda:0"] == {"error": "the device is taken"}
    assert said["npu:0"]["memory"]["total"] == 21 * MIB


def test_the_program_prints_every_device_and_one_line_for_what_is_absent() -> None:
    done = run_program(PREFERRED_DEVICE="")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    said = device_summary()
    assert [line.split()[0] for line in lines[:-2]] == [*said["devices"], *said["absent"]]
    for kind, reason in said["absent"].items():
        assert f"{kind:8}none: {reason}" in lines
    host = next(line for line in lines if line.startswith("cpu"))
    assert f"of {said['devices']['cpu']['memory']['total'] / 2**30:.1f} GiB free (the host's memory)" in host
    assert lines[-2].startswith(f"preferred: {get_all_devices()[0]} (the best there is")
    assert lines[-1].startswith(f"torch {torch.__version__}")


def test_the_program_prints_json_for_programs() -> None:
    done = run_program("--json", PREFERRED_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said.keys() == device_summary().keys()
    assert (said["preferred"], said["preferred_because"]) == ("cpu", "PREFERRED_DEVICE=cpu")
    assert said["devices"]["cpu"]["dtypes"][0] == "float32"


def test_a_preference_for_a_device_that_is_not_there_is_one_line_and_the_others_are_listed() -> None:
    done = run_program(PREFERRED_DEVICE="cuda:99")
    assert (done.returncode, done.stderr) == (0, "")
    assert "preferred: none (PREFERRED_DEVICE: device 'cuda:99' is not there: " in done.stdout
    assert done.stdout.startswith(str(get_all_devices()[0]))


def test_an_unknown_argument_is_an_error_without_a_traceback() -> None:
    done = run_program("--yaml")
    assert done.returncode == 2
    assert done.stderr.endswith("error: unrecognized arguments: --yaml\n")
    assert "Traceback" not in done.stderr


def test_the_program_tells_why_a_torch_npu_without_cann_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    metadata = tmp_path / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    done = run_program(PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    reason = (
        "torch_npu does not load (libhccl.so: cannot open shared object file); has CANN's set_env.sh been sourced?"
    )
    assert f"npu     none: {reason}" in done.stdout.splitlines()
    assert "torch_npu 2.13.0" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("package", ["ascend", "ascend.device"])
def test_importing_the_package_looks_for_no_device(package: str) -> None:
    code = f"import sys, {package}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_build_without_cuda_is_named_and_no_variable_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert why_absent("cuda") == f"torch {torch.__version__} is built without CUDA"
