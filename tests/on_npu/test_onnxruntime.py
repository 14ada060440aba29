"""The genuine, unmodified onnxruntime-cann runs ONNX models on the emulated chip, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build
from tests.on_npu import offline_models

if "CANN_EMULATOR_SOC" not in os.environ:
    pytest.skip("installs into the emulator's cache", allow_module_level=True)

# A session that cannot use CANN silently falls back to the CPU, so its providers are checked. Without dump_om_model=0
# it would write OMs into the working directory, and take them for a model of any chip.
PROGRAM = """
import sys
import numpy as np
import onnxruntime

model, precision = sys.argv[1:]
options = {"device_id": 0, "dump_om_model": "0", "precision_mode": precision}
session = onnxruntime.InferenceSession(model, providers=[("CANNExecutionProvider", options)])
assert session.get_providers()[0] == "CANNExecutionProvider", session.get_providers()
cpu = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for batch in (2, 3, 2):  # another shape compiles again
    x = np.random.default_rng(batch).standard_normal((batch, 16)).astype(np.float32)
    y, expected = session.run(None, {"x": x})[0], cpu.run(None, {"x": x})[0]
    print(np.abs(y - expected).max())
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["force_fp16", "must_keep_origin_dtype"])
def test_onnxruntime_cann(tmp_path: Path, precision: str) -> None:
    model = offline_models.save_linear(tmp_path / "linear.onnx")
    environment = {**os.environ, "PYTHONPATH": str(build.onnxruntime_cann_site())}
    command = [sys.executable, "-c", PROGRAM, str(model), precision]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    exact = precision == "must_keep_origin_dtype" and offline_models.SOC == "Ascend910B3"
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 3
    assert all(error < (1e-5 if exact else 4e-3) for error in errors)
    assert exact or max(errors) > 1e-5  # the chip rounds, and a CPU would not
    assert not list(tmp_path.glob("*.om"))
