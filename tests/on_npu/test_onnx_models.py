"""How the emulated CANN reads models of ONNX: every way to store values, what is refused, and the operators that have
rules of their own. `scripts/upstream/run_onnx_tests.py` has ONNX's own tests of the others.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ascend.om import OmSession

onnx = pytest.importorskip("onnx")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
helper, TensorProto = onnx.helper, onnx.TensorProto
if "CANN_EMULATOR_SOC" not in os.environ:
    pytest.skip("these are the emulator's own", allow_module_level=True)

SOC = os.environ["CANN_EMULATOR_SOC"]
Convert = Callable[..., tuple[int, str]]


def model_of(graph: str, opset: int = 17) -> onnx.ModelProto:
    """From ONNX's text: "(float[2,3] x) => (float[2,3] y) { y = Relu(x) }"."""
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> model {graph}')


@pytest.fixture
def convert(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Convert:
    """atc's code in this process: its exit code, and what it says. The model is exact in float32."""
    main = ctypes.CDLL("libcann_emulator.so").cann_emulator_atc

    def run(model: onnx.ModelProto | Path) -> tuple[int, str]:
        path = model if isinstance(model, Path) else tmp_path / "model.onnx"
        if not isinstance(model, Path):
            path.write_bytes(model.SerializeToString())
        options = {"model": path, "output": tmp_path / "model", "soc_version": SOC, "framework": 5}
        words = ["atc", *(f"--{name}={value}" for name, value in options.items()), "--precision_mode_v2=origin"]
        capfd.readouterr()
        code = main(len(words), (ctypes.c_char_p * len(words))(*(word.encode() for word in words)))
        return code, capfd.readouterr().out

    return run


def results(convert: Convert, tmp_path: Path, model: onnx.ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    code, text = convert(model)
    assert code == 0, text
    with OmSession(tmp_path / "model.om") as session:
        return list(session.run(feeds).values())


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


STORED = {
    "floats": (TensorProto.FLOAT, [0.5, -1.25, 3.0]),
    "doubles": (TensorProto.DOUBLE, [0.5, -1.25, 3.0]),
    "halves": (TensorProto.FLOAT16, [0.5, -1.25, 3.0]),
    "bfloats": (TensorProto.BFLOAT16, [0.5, -1.25, 3.0]),
    "integers": (TensorProto.INT64, [2**40, -1, 0]),
    "negative": (TensorProto.INT32, [-7, 7, 0]),
    "bytes": (TensorProto.INT8, [-128, 127, 0]),
    "unsigned": (TensorProto.UINT8, [255, 127, 0]),
    "flags": (TensorProto.BOOL, [True, False, True]),
}


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
@pytest.mark.parametrize(("dtype", "numbers"), STORED.values(), ids=STORED)
def test_stored_values_are_read(convert: Convert, tmp_path: Path, dtype: int, numbers: list, raw: bool) -> None:
    if dtype == TensorProto.BFLOAT16 and SOC.startswith("Ascend310P"):
        pytest.skip("310P has no bfloat16")
    stored = helper.make_tensor("stored", dtype, [3], numbers)
    if raw:
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        stored = helper.make_tensor("stored", dtype, [3], np.array(numbers, kind).tobytes(), raw=True)
    model = model_of("(float[3] x) => (float[3] y) { wide = Cast<to=1>(stored)\n y = Add(x, wide) }")
    model.graph.initializer.append(stored)
    (y,) = results(convert, tmp_path, model, x=np.zeros(3, np.float32))
    np.testing.assert_array_equal(y, np.array(numbers, np.float32))


def test_weights_beside_the_model(convert: Convert, tmp_path: Path) -> None:
    weight, x = values(8, 8), values(2, 8)
    model = model_of("(float[2,8] x) => (float[2,8] y) { y = Add(x, weight_row)\n }")
    model.graph.node.insert(0, helper.make_node("ReduceSum", ["weight", "axes"], ["weight_row"], keepdims=1))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axes"))
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.bin", size_threshold=64)
    (y,) = results(convert, tmp_path, path, x=x)
    np.testing.assert_allclose(y, x + weight.sum(0), rtol=1e-5, atol=1e-5)

    whole = (tmp_path / "external.bin").read_bytes()
    (tmp_path / "external.bin").write_bytes(whole[: len(whole) // 2])
    assert "E10041" in convert(path)[1]
    (tmp_path / "external.bin").unlink()
    code, text = convert(path)
    assert code != 0 and f"E10041: Failed to load the model from {tmp_path}/external.bin." in text


def test_names_of_outputs(convert: Convert, tmp_path: Path) -> None:
    model = model_of("(float[2,4] x) => (float[2,2] a, float[2,2] b, float[2,4] x) { a, b = Split<axis=1>(x) }")
    code, text = convert(model)
    assert code == 0, text
    with OmSession(tmp_path / "model.om") as session:
        assert [tensor.name for tensor in session.outputs] == ["a", "b", "x"]
        assert [tensor.shape for tensor in session.outputs] == [(2, 2), (2, 2), (2, 4)]
        found = session.run({"x": values(2, 4)})
    np.testing.assert_array_equal(np.concatenate([found["a"], found["b"]], 1), found["x"])


# Where ONNX and GE differ, or several nodes of GE make one of ONNX: opset, graph.
OPERATORS = {
    "Reshape copies 0": (17, "(float[2,3,4] x) => (float[2,12] y) <int64[2] s = {0,-1}> { y = Reshape(x, s) }"),
    "Expand both ways": (17, "(float[3,1,4] x) => (float[2,3,5,4] y) <int64[4] s = {2,1,5,1}> { y = Expand(x, s) }"),
    "Expand to fewer": (17, "(float[2,3,4] x) => (float[2,3,4] y) <int64[1] s = {1}> { y = Expand(x, s) }"),
    "Slice backwards": (
        17,
        """(float[2,9] x) => (float[2,4] y)
        <int64[1] b = {-2}, int64[1] e = {-100}, int64[1] a = {-1}, int64[1] s = {-2}> { y = Slice(x, b, e, a, s) }""",
    ),
    "Slice from outside": (
        17,
        """(float[2,9] x) => (float[2,5] y)
        <int64[1] b = {100}, int64[1] e = {0}, int64[1] a = {1}, int64[1] s = {-2}, int64[1] f = {1}>
        { t = Slice(x, b, e, a, s) z = Slice(x, e, f, a) y = Concat<axis=1>(t, z) }""",
    ),
    "Gemm": (
        17,
        "(float[3,2] x) => (float[2,2] y) <float[2] c = {1,2}> { y = Gemm<transA=1,alpha=0.5,beta=2.0>(x, x, c) }",
    ),
    "LayerNormalization": (
        17,
        """(float[2,3,4] x) => (float[2,3,4] y, float[2,3,1] m, float[2,3,1] d)
        <float[4] g = {1,2,3,4}> { y, m, d = LayerNormalization<epsilon=0.01>(x, g) }""",
    ),
    "InstanceNormalization": (
        17,
        "(float[2,3,4] x) => (float[2,3,4] y) <float[3] g = {1,2,3}> { y = InstanceNormalization(x, g, g) }",
    ),
    "Conv of one dimension": (
        17,
        """(float[1,2,5] x) => (float[1,1,3] y)
        <float[1,2,3] w = {1,2,3,4,5,6}> { y = Conv<kernel_shape=[3],pads=[0,1],strides=[2]>(x, w) }""",
    ),
    "Resize by factors": (
        17,
        """(float[1,2,3,4] x) => (float[1,2,6,12] y) <float[4] f = {1,1,2,3}> {
        y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(x, , f) }""",
    ),
    "Clip on one side": (17, "(float[2,3] x) => (float[2,3] y) <float z = {0}> { y = Clip(x, , z) }"),
    "Squeeze in two opsets": (12, "(float[1,3,1] x) => (float[3] y) { y = Squeeze<axes=[0,-1]>(x) }"),
    "Squeeze all": (17, "(float[1,3,1] x) => (float[3] y) { y = Squeeze(x) }"),
    "ArgMax keeps": (17, "(float[2,3,4] x) => (int64[2,1,4] y) { y = ArgMax<axis=-2>(x) }"),
    "GatherND": (17, "(float[2,3,4] x) => (float[2,4] y) <int64[2,2] i = {0,-1,1,0}> { y = GatherND(x, i) }"),
    "Gather counts back": (17, "(float[2,3] x) => (float[2,2] y) <int64[2] i = {-1,0}> { y = Gather<axis=1>(x, i) }"),
    "Trilu": (17, "(float[3,4] x) => (float[3,4] y) <int64 k = {-1}> { y = Trilu<upper=0>(x, k) }"),
    "Flatten counts back": (17, "(float[2,3,4] x) => (float[6,4] y) { y = Flatten<axis=-1>(x) }"),
    "Pad of pairs": (17, "(float[2,3] x) => (float[3,6] y) <int64[4] p = {1,1,0,2}> { y = Pad(x, p) }"),
    "Shape arithmetic": (
        17,
        """(float[2,3,4] x) => (float[4,6] y) <int64[1] o = {2}, int64[1] r = {-1}>
        { s = Shape(x) n = Gather<axis=0>(s, o) t = Concat<axis=0>(n, r) y = Reshape(x, t) }""",
    ),
}


@pytest.mark.parametrize(("opset", "graph"), OPERATORS.values(), ids=OPERATORS)
def test_operator_is_the_standards(convert: Convert, tmp_path: Path, opset: int, graph: str) -> None:
    model = model_of(graph, opset)
    x = values(*(size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim))
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    found = results(convert, tmp_path, model, x=x)
    for result, wanted in zip(found, expected, strict=True):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(
            result, wanted, rtol=1e-4, atol=2e-2 if "Conv" in graph or "Gemm" in graph else 1e-5
        )


def test_softmax_before_opset_13(convert: Convert, tmp_path: Path) -> None:
    """It is over all dimensions from the axis on; ONNX's evaluator knows only the later meaning."""
    x = values(2, 3, 4)
    (y,) = results(convert, tmp_path, model_of("(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }", 12), x=x)
    weights = np.exp(x)
    np.testing.assert_allclose(y, weights / weights.sum((1, 2), keepdims=True), rtol=1e-5)


ABS = "(float[2] x) => (float[2] y) { y = Abs(x) }"
REFUSED = {
    "opset 19": (19, ABS, "E16002: No ONNX parser is registered for optype ai.onnx::19::Abs."),
    "opset 7": (7, ABS, "E16002: No ONNX parser is registered for optype ai.onnx::7::Abs."),
    "LayerNormalization after 18 only": (
        18,
        "(float[2] x) => (float[2] y) { y = GroupNormalization<num_groups=1>(x, x, x) }",
        "E16002: No ONNX parser is registered for optype ai.onnx::18::GroupNormalization.",
    ),
    "ReduceL2 of opset 18": (18, "(float[2] x) => (float[1] y) { y = ReduceL2(x) }", "ai.onnx::18::ReduceL2."),
    "Trilu of opset 13": (13, "(float[2,2] x) => (float[2,2] y) { y = Trilu(x) }", "ai.onnx::13::Trilu."),
    "another domain": (
        17,
        "(float[2] x) => (float[2] y) { y = custom.Abs(x) }",
        "E19999: The opset of domain[custom]",
    ),
    "no input": (17, "() => (float[1] y) { y = Constant<value = float[1] {1}>() }", "E16001: The model has no input"),
    "no output": (17, "(float[2] x) => () { y = Abs(x) }", "E16001: The model has no output node."),
    "part of a shape": (15, "(float[2,3] x) => (int64[1] y) { y = Shape<start=1>(x) }", "E10055.*`start` and `end`"),
    "GatherND by batches": (
        17,
        "(float[2,3] x) => (float[2] y) <int64[2,1] i = {0,1}> { y = GatherND<batch_dims=1>(x, i) }",
        "E11010: CANN takes no other batch_dims than 0",
    ),
    "ArgMax of the last": (
        17,
        "(float[2,3] x) => (int64[2,1] y) { y = ArgMax<axis=1,select_last_index=1>(x) }",
        "E11010: CANN takes no other select_last_index than 0",
    ),
    "a constant of numbers": (
        17,
        "(float[2] x) => (float[2] y) { c = Constant<value_float=1.0>() y = Add(x, c) }",
        "E10055.*CANN reads no other",
    ),
    "an attribute that is unknown": (
        17,
        "(float[2] x) => (float[2] y) { y = Abs<odd=1>(x) }",
        "E10055.*attribute odd",
    ),
    "a graph in a node": (
        17,
        """(float[2] x, bool c) => (float[2] y)
        { y = If (c) <then_branch = a () => (float[2] z) { z = Abs(x) },
                      else_branch = b () => (float[2] w) { w = Neg(x) }> }""",
        "E10055.*a graph within a node is not emulated",
    ),
    "two nodes of a name": (
        17,
        "(float[2] x) => (float[2] y) { [same] t = Abs(x) [same] y = Neg(t) }",
        "E13009: Operator same already exists in the graph.",
    ),
    "a rounding that matters": (
        17,
        """(float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] f = {1,1,2,2}> {
        y = Resize<mode="nearest",coordinate_transformation_mode="half_pixel",nearest_mode="ceil">(x, , f) }""",
        "nearest_mode ceil would change the result",
    ),
}


@pytest.mark.parametrize(("opset", "graph", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(convert: Convert, opset: int, graph: str, text: str) -> None:
    code, said = convert(model_of(graph, opset))
    assert code != 0
    assert all(part in said for part in text.split(".*")), said


@pytest.mark.parametrize(("content", "code"), [(b"no protobuf", "E10041"), (b"\x08\x08", "E16004")])
def test_no_model(convert: Convert, tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    status, text = convert(path)
    assert status != 0 and code in text
