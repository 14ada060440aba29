"""Small ONNX models and the command that converts them, for the tests of offline models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.programs import ROOT

SOC = os.environ.get("CANN_EMULATOR_SOC", "")
OTHER = {"Ascend310P3": "Ascend910B3", "Ascend910B3": "Ascend310P3"}
FEATURES, RESULTS, WORDS = 16, 8, 32
HALF = 4e-3  # of values around 1: some operations in float16


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _initializer(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape) / 4
    return numpy_helper.from_array(values.astype(np.float32), name)


def _save(path: Path, nodes: list, inputs: list, outputs: list, weights: list, opset: int = 17) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


def save_linear(path: Path, batch: int | str = "batch", opset: int = 17, dtype: int = TensorProto.FLOAT) -> Path:
    """y = relu(x @ weight + bias): x [batch, 16], y [batch, 8]."""
    weight, bias = _initializer("weight", FEATURES, RESULTS), _initializer("bias", RESULTS)
    if dtype == TensorProto.FLOAT16:
        weight, bias = (
            numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float16), t.name) for t in (weight, bias)
        )
    return _save(
        path,
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"], name="product_node"),
            helper.make_node("Add", ["product", "bias"], ["sum"], name="sum_node"),
            helper.make_node("Relu", ["sum"], ["y"], name="relu_node"),
        ],
        [helper.make_tensor_value_info("x", dtype, [batch, FEATURES])],
        [helper.make_tensor_value_info("y", dtype, [batch, RESULTS])],
        [weight, bias],
        opset,
    )


def save_two_inputs(path: Path) -> Path:
    """rows = table[ids] + shift: ids int64 [batch, words], shift [batch, 1, 8], rows [batch, words, 8]."""
    return _save(
        path,
        [
            helper.make_node("Gather", ["table", "ids"], ["found"], name="gather_node"),
            helper.make_node("Add", ["found", "shift"], ["rows"], name="add_node"),
        ],
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "words"]),
            helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["batch", 1, RESULTS]),
        ],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "words", RESULTS])],
        [_initializer("table", WORDS, RESULTS)],
    )


def save_image(path: Path, height: int | str = "height", width: int | str = "width") -> Path:
    """features = conv(image): image [1, 3, height, width], features [1, 4, height, width]."""
    return _save(
        path,
        [helper.make_node("Conv", ["image", "filters"], ["features"], name="conv_node", kernel_shape=[1, 1])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, height, width])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, 4, height, width])],
        [_initializer("filters", 4, 3, 1, 1)],
    )


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def linear(path: Path, x: np.ndarray) -> np.ndarray:
    """What `save_linear`'s model computes, in float32."""
    weights = weights_of(path)
    return np.maximum(x.astype(np.float32) @ weights["weight"] + weights["bias"], 0)


def convert(model: Path, soc: str, *options: str) -> Path:
    """The OM beside the model, made by the command `atc`."""
    output = model.with_suffix("")
    command = [f"--model={model}", "--framework=5", f"--output={output}", f"--soc_version={soc}", *options]
    program = shutil.which("atc")
    assert program is not None, "atc is not on PATH"
    done = subprocess.run([program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "ATC run success" in done.stdout
    return output.with_suffix(".om")


def convert_on(soc: str, model: Path) -> Path:
    """The OM beside the model, made by the atc of another emulated chip."""
    command = [sys.executable, "-m", "emulator", "run", "--soc", soc, "--", "atc", "--framework=5"]
    command += [f"--model={model}", f"--output={model.with_suffix('')}", f"--soc_version={soc}"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return model.with_suffix(".om")
