"""The genuine, unmodified onnxruntime-cann runs ONNX models on the emulated chip, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emulator import build
from runners.clip.checkpoint import load_processor
from runners.clip.inputs import prepare_pictures
from runners.offline.converter import convert_clip
from tests.on_npu import offline_models
from tests.programs import ROOT

CLIP = ROOT / "examples/clip/demo_model"

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

TOWERS = """
import sys
import numpy as np
import onnxruntime

options = {"device_id": 0, "dump_om_model": "0", "precision_mode": "force_fp16"}
for model, feed in zip(sys.argv[1::2], sys.argv[2::2]):
    session = onnxruntime.InferenceSession(model, providers=[("CANNExecutionProvider", options)])
    assert session.get_providers()[0] == "CANNExecutionProvider", session.get_providers()
    cpu = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.load(feed)}
    y, expected = session.run(None, feeds)[0], cpu.run(None, feeds)[0]
    print(np.abs(y - expected).max() / np.abs(expected).max())
assert "torch" not in sys.modules
"""


def run(program: str, folder: Path, *arguments: object) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(build.onnxruntime_cann_site())}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.om"))
    return [float(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["force_fp16", "must_keep_origin_dtype"])
def test_onnxruntime_cann(tmp_path: Path, precision: str) -> None:
    model = offline_models.save_linear(tmp_path / "linear.onnx")
    exact = precision == "must_keep_origin_dtype" and offline_models.SOC == "Ascend910B3"
    errors = run(PROGRAM, tmp_path, model, precision)
    assert len(errors) == 3
    assert all(error < (1e-5 if exact else 4e-3) for error in errors)
    assert exact or max(errors) > 1e-5  # the chip rounds, and a CPU would not


@pytest.mark.slow
def test_onnxruntime_cann_runs_both_towers_of_the_demo_clip(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    convert_clip(None, str(CLIP), tmp_path / "onnx")
    processor = load_processor(str(CLIP))
    np.save(tmp_path / "pictures.npy", prepare_pictures(processor, [CLIP.parent / "shapes.png"]).numpy())
    ids = processor.tokenizer("a red circle", padding="max_length", return_tensors="np").input_ids
    np.save(tmp_path / "texts.npy", ids)
    models = [tmp_path / "onnx" / f"{name}_tower.onnx" for name in ("image", "text")]
    errors = run(TOWERS, tmp_path, models[0], tmp_path / "pictures.npy", models[1], tmp_path / "texts.npy")
    assert len(errors) == 2 and max(errors) < 1e-2  # float16, of the largest feature
