"""Offline models on the chip: OmSession, profiles, precision and AIPP against numpy, and what is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from ascend.om import OmError, OmSession
from tests.on_npu import offline_models
from tests.on_npu.offline_models import FEATURES, HALF, RESULTS, WORDS, linear, random, weights_of
from tests.programs import ROOT

ON_EMULATOR = "CANN_EMULATOR_SOC" in os.environ
PROFILES = ("--input_shape=x:-1,16", "--dynamic_batch_size=1,2,4")


@pytest.fixture(scope="module")
def soc() -> str:
    return torch.npu.get_device_name(0)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, soc: str) -> Callable[..., tuple[Path, Path]]:
    """Makes an ONNX model and its OM, once for each name."""
    directory, made = tmp_path_factory.mktemp("om"), {}

    def make_one(name: str, save: Callable[[Path], Path], *options: str) -> tuple[Path, Path]:
        if name not in made:
            model = save(directory / f"{name}.onnx")
            made[name] = model, offline_models.convert(model, soc, *options)
        return made[name]

    return make_one


@pytest.fixture(scope="module")
def fixed(make: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return make("fixed", lambda path: offline_models.save_linear(path, batch=2))


@pytest.fixture(scope="module")
def batches(make: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return make("batches", offline_models.save_linear, *PROFILES)


def test_inputs_and_outputs_are_described(fixed: tuple[Path, Path]) -> None:
    with OmSession(fixed[1]) as session:
        (x,), (y,) = session.inputs, session.outputs
    assert (x.name, x.shape, x.dtype) == ("x", (2, FEATURES), np.float32)
    assert (y.name, y.shape, y.dtype) == ("y", (2, RESULTS), np.float32)


def test_a_model_computes_in_float16(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    with OmSession(om) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)
    np.testing.assert_array_equal(y, y.astype(np.float16))  # it was


def test_a_path_may_be_far_away(fixed: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "ein Ordner"
    target.mkdir()
    moved = target / "m.om"
    moved.write_bytes(fixed[1].read_bytes())
    session = OmSession(str(moved))
    moved.unlink()  # the weights are mapped, and stay
    with session:
        assert session.run({"x": random(2, FEATURES)})["y"].shape == (2, RESULTS)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_profiles_of_the_batch(batches: tuple[Path, Path], batch: int) -> None:
    model, om = batches
    x = random(batch, FEATURES)
    with OmSession(om) as session:
        assert session.inputs[0].shape == (-1, FEATURES)
        assert session.outputs[0].shape == (4, RESULTS)
        for _ in range(2):
            np.testing.assert_allclose(session.run({"x": x})["y"], linear(model, x), atol=HALF)
        other = random(3 - batch if batch < 3 else 1, FEATURES)
        np.testing.assert_allclose(session.run({"x": other})["y"], linear(model, other), atol=HALF)


def test_profiles_of_all_dimensions(make: Callable[..., tuple[Path, Path]]) -> None:
    """In the order of --input_shape, which is not that of the model."""
    model, om = make(
        "dims",
        offline_models.save_two_inputs,
        *("--input_shape=shift:-1,1,8;ids:-1,-1", "--dynamic_dims=1,1,3;2,2,5", "--input_format=ND"),
    )
    table = weights_of(model)["table"]
    with OmSession(om) as session:
        for batch, words in [(1, 3), (2, 5)]:
            ids = np.arange(batch * words).reshape(batch, words) % WORDS
            shift = random(batch, 1, RESULTS)
            rows = session.run({"ids": ids, "shift": shift})["rows"]
            np.testing.assert_allclose(rows, table[ids] + shift, atol=HALF)
        with pytest.raises(OmError, match=r"sizes in a row are \(1, 5, 1, 1, 8\)"):
            session.run({"ids": np.zeros((1, 5), np.int64), "shift": random(1, 1, RESULTS)})


def test_profiles_of_the_image(make: Callable[..., tuple[Path, Path]]) -> None:
    model, om = make(
        "images", offline_models.save_image, "--input_shape=image:1,3,-1,-1", "--dynamic_image_size=4,6;8,8"
    )
    filters = weights_of(model)["filters"][:, :, 0, 0]
    with OmSession(om) as session:
        for height, width in [(4, 6), (8, 8)]:
            image = random(1, 3, height, width)
            features = session.run({"image": image})["features"]
            np.testing.assert_allclose(features, np.einsum("oc,nchw->nohw", filters, image), atol=HALF)
        with pytest.raises(OmError, match=r"heights and widths are \[\(6, 4\)\]"):
            session.run({"image": random(1, 3, 6, 4)})


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    "option, of_operands, of_products, of_results",
    [
        ("--precision_mode=force_fp16", True, True, True),
        ("--precision_mode_v2=fp16", True, True, True),
        ("--precision_mode=allow_fp32_to_fp16", True, True, False),
        ("--precision_mode=allow_mix_precision", True, True, False),
        ("--precision_mode_v2=mixed_float16", True, True, False),
        ("--precision_mode=force_fp32", True, False, False),
        ("--precision_mode_v2=cube_fp16in_fp32out", True, False, False),
        ("--precision_mode=must_keep_origin_dtype", False, False, False),
        ("--precision_mode_v2=origin", False, False, False),
    ],
)
def test_precision_modes(
    tmp_path: Path, soc: str, option: str, of_operands: bool, of_products: bool, of_results: bool
) -> None:
    """What is rounded to float16; inputs and outputs are float32 in all modes. 310P has no float32 products."""
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    x, (weight, bias) = random(2, FEATURES), weights_of(model).values()
    with OmSession(offline_models.convert(model, soc, option)) as session:
        y = session.run({"x": x})["y"]
    product = half(x) @ half(weight) if of_operands or soc == "Ascend310P3" else x @ weight
    product = half(product) if of_products else product
    expected = np.maximum(half(product + half(bias)) if of_results else product + bias, 0)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-3)  # a unit of float16: sums have an order of their own
    assert np.median(np.abs(y - expected)[expected > 0]) < 1e-6
    if of_operands or soc == "Ascend310P3":
        assert np.median(np.abs(y - linear(model, x))[expected > 0]) > 1e-5


def test_a_bfloat16_mode(tmp_path: Path, soc: str) -> None:
    if soc == "Ascend310P3":
        pytest.skip("310P has no bfloat16; test_atc.py has the refusal")
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    x = random(2, FEATURES)
    with OmSession(offline_models.convert(model, soc, "--precision_mode_v2=mixed_bfloat16")) as session:
        error = np.abs(session.run({"x": x})["y"] - linear(model, x)).max()
    assert 1e-4 < error < 4e-2


def test_output_type_and_half_inputs(tmp_path: Path, soc: str) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    om = offline_models.convert(model, soc, "--output_type=FP16", "--input_fp16_nodes=x")
    x = random(2, FEATURES).astype(np.float16)
    with OmSession(om) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)


def test_a_float16_model_keeps_its_dtype(tmp_path: Path, soc: str) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2, dtype=TensorProto.FLOAT16)
    x = random(2, FEATURES).astype(np.float16)
    with OmSession(offline_models.convert(model, soc)) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)


AIPP = """aipp_op {
    aipp_mode: static
    input_format: RGB888_U8   # a comment
    src_image_size_w: 8
    src_image_size_h: 6
    crop: true
    load_start_pos_w: 2
    load_start_pos_h: 1
    rbuv_swap_switch: true
    mean_chn_0: 100
    min_chn_1: 5.0
    var_reci_chn_0: 0.0078125
    var_reci_chn_1: 0.015625
    var_reci_chn_2: 0.00390625
}
"""


def test_aipp(tmp_path: Path, soc: str) -> None:
    """swap, crop, (x - mean - min) * var: config_file_template.md."""
    (tmp_path / "aipp.cfg").write_text(AIPP)
    model = offline_models.save_image(tmp_path / "m.onnx", height=4, width=6)
    om = offline_models.convert(model, soc, f"--insert_op_conf={tmp_path / 'aipp.cfg'}")
    picture = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3), dtype=np.uint8)
    with OmSession(om) as session:
        assert session.inputs[0].shape == (1, 6, 8, 3)
        assert session.inputs[0].dtype == np.uint8
        features = session.run({"image": picture})["features"]
    cropped = picture[:, 1:5, 2:8, ::-1].astype(np.float32)
    image = (cropped - [100, 0, 0] - [0, 5, 0]) * [1 / 128, 1 / 64, 1 / 256]
    filters = weights_of(model)["filters"][:, :, 0, 0]
    np.testing.assert_allclose(features, np.einsum("oc,nhwc->nohw", filters, image), atol=2 * HALF)


YUV = """aipp_op {
    aipp_mode: static
    input_format: YUV420SP_U8
    csc_switch: true
    src_image_size_w: 8
    src_image_size_h: 6
    crop: true
    load_start_pos_w: 2
    load_start_pos_h: 2
    var_reci_chn_0: 0.0078125
    var_reci_chn_1: 0.015625
    var_reci_chn_2: 0.00390625
"""
# CSC_config.md of the same: YUV to RGB of a JPEG, and RGB to YUV of BT-601 NARROW
JPEG_TO_RGB = [[256, 0, 359], [256, -88, -183], [256, 454, 0]]
TO_BGR = [[298, 516, 0], [298, -100, -208], [298, 0, 409]]  # the defaults, of BT-601 NARROW
TO_YUV = [[66, 129, 25], [-38, -74, 112], [112, -94, -18]]


def matrix_of(rows: list[list[int]]) -> str:
    return "".join(f"matrix_r{r}c{c}: {number}\n" for r, row in enumerate(rows) for c, number in enumerate(row))


def planes_of(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """[3, height, width] of NV12: brightness above, and below it half as many rows with both colours in turn."""
    below = picture[height:].reshape(height // 2, width // 2, 2)
    return np.stack([picture[:height], *np.kron(np.moveaxis(below, 2, 0), np.ones((2, 2), np.uint8))]).astype(int)


@pytest.mark.parametrize(
    "more, order, rows, bias",
    [
        ("", [0, 1, 2], TO_BGR, [16, 128, 128]),
        ("rbuv_swap_switch: true", [0, 2, 1], TO_BGR, [16, 128, 128]),
        (f"{matrix_of(JPEG_TO_RGB)} input_bias_0: 0", [0, 1, 2], JPEG_TO_RGB, [0, 128, 128]),
    ],
    ids=["NV12 to BGR by defaults", "NV21 to BGR", "JPEG's NV12 to RGB"],
)
def test_aipp_of_yuv(
    tmp_path: Path, soc: str, more: str, order: list[int], rows: list[list[int]], bias: list[int]
) -> None:
    """(matrix @ (YUV - bias)) >> 8, without another bias behind it: config_file_template.md."""
    (tmp_path / "aipp.cfg").write_text(f"{YUV} {more} }}")
    model = offline_models.save_image(tmp_path / "m.onnx", height=4, width=6)
    om = offline_models.convert(model, soc, f"--insert_op_conf={tmp_path / 'aipp.cfg'}")
    picture = np.random.default_rng(1).integers(0, 256, (1, 9, 8, 1), dtype=np.uint8)
    picture[0, :6, :, 0], picture[0, 6:, ::2, 0], picture[0, 6:, 1::2, 0] = 81, 90, 240  # red, by BT-601 NARROW
    picture[0, 2, 3:5, 0] = 0, 255  # and what has to be cut off at 0 and 255
    with OmSession(om) as session:
        assert session.inputs[0].shape == (1, 9, 8, 1)  # n, h * 1.5, w, 1: aclmdlGetInputDimsV2.md
        features = session.run({"image": picture})["features"]
    yuv = planes_of(picture[0, :, :, 0], 6, 8)[order][:, 2:6, 2:8] - np.reshape(bias, (3, 1, 1))
    colours = np.clip(np.einsum("cd,dhw->chw", np.array(rows), yuv) >> 8, 0, 255)
    if not more:
        np.testing.assert_allclose(colours[:, 3, 0], [0, 0, 255], atol=2)
    image = colours * np.reshape([1 / 128, 1 / 64, 1 / 256], (3, 1, 1))
    filters = weights_of(model)["filters"][:, :, 0, 0]
    np.testing.assert_allclose(features[0], np.einsum("oc,chw->ohw", filters, image), atol=2 * HALF)


def test_aipp_makes_yuv_of_rgb(tmp_path: Path, soc: str) -> None:
    """(matrix @ RGB) >> 8, and then the bias."""
    content = "aipp_op { aipp_mode: static input_format: RGB888_U8 csc_switch: true"
    (tmp_path / "aipp.cfg").write_text(content + "".join(f" var_reci_chn_{i}: 0.00390625" for i in range(3)) + " }")
    model = offline_models.save_image(tmp_path / "m.onnx", height=4, width=6)
    om = offline_models.convert(model, soc, f"--insert_op_conf={tmp_path / 'aipp.cfg'}")
    picture = np.random.default_rng(1).integers(0, 256, (1, 4, 6, 3), dtype=np.uint8)
    picture[0, 0, 0] = 255, 0, 0
    with OmSession(om) as session:
        features = session.run({"image": picture})["features"]
    products = np.einsum("cd,hwd->chw", np.array(TO_YUV), picture[0].astype(int)) >> 8
    yuv = np.clip(products + np.reshape([16, 128, 128], (3, 1, 1)), 0, 255)
    np.testing.assert_allclose(yuv[:, 0, 0], [81, 90, 240], atol=1)
    filters = weights_of(model)["filters"][:, :, 0, 0]
    np.testing.assert_allclose(features[0], np.einsum("oc,chw->ohw", filters, yuv / 256), atol=2 * HALF)


@pytest.mark.parametrize(
    "ax, rbuv, order",
    [
        ("false", "false", [0, 1, 2]),
        ("false", "true", [2, 1, 0]),
        ("true", "false", [1, 2, 3]),
        ("true", "true", [3, 2, 1]),
    ],
    ids=["RGBX", "BGRX", "XRGB", "XBGR"],
)
def test_aipp_of_four_channels(tmp_path: Path, soc: str, ax: str, rbuv: str, order: list[int]) -> None:
    """Table 2 of config_file_template.md."""
    switches = f"ax_swap_switch: {ax} rbuv_swap_switch: {rbuv}"
    scale = "".join(f" var_reci_chn_{i}: 0.00390625" for i in range(3))
    (tmp_path / "aipp.cfg").write_text(f"aipp_op {{ aipp_mode: static input_format: XRGB8888_U8 {switches}{scale} }}")
    model = offline_models.save_image(tmp_path / "m.onnx", height=4, width=6)
    om = offline_models.convert(model, soc, f"--insert_op_conf={tmp_path / 'aipp.cfg'}")
    picture = np.random.default_rng(1).integers(0, 256, (1, 4, 6, 4), dtype=np.uint8)
    with OmSession(om) as session:
        features = session.run({"image": picture})["features"]
    filters = weights_of(model)["filters"][:, :, 0, 0]
    expected = np.einsum("oc,hwc->ohw", filters, picture[0][:, :, order] / 256)
    np.testing.assert_allclose(features[0], expected, atol=2 * HALF)


def test_two_sessions_and_two_threads(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    results = []

    def work() -> None:
        with OmSession(om) as session:
            results.extend(session.run({"x": x})["y"] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10
    for y in results:
        np.testing.assert_allclose(y, linear(model, x), atol=HALF)


def test_threads_take_turns_and_each_gets_its_own_result(batches: tuple[Path, Path]) -> None:
    """One session has one memory for inputs and outputs."""
    model, om = batches
    wrong: list[int] = []

    def work(session: OmSession, batch: int) -> None:
        x = random(batch, FEATURES)
        expected = linear(model, x)
        for _ in range(20):
            y = session.run({"x": x})["y"]
            if y.shape != expected.shape or np.abs(y - expected).max() > HALF:
                wrong.append(batch)

    with OmSession(om) as session:
        threads = [threading.Thread(target=work, args=(session, batch)) for batch in (1, 2, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_session_that_is_closed_says_so(fixed: tuple[Path, Path]) -> None:
    session, stream = OmSession(fixed[1]), torch.npu.Stream()
    run = session.submit({"x": random(2, FEATURES)}, stream.npu_stream)
    session.close()
    for use in (run.result, lambda: session.run({"x": random(2, FEATURES)})):
        with pytest.raises(OmError, match="the session is closed"):
            use()
    session.close()


def test_beside_torch_on_a_stream(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    stream = torch.npu.Stream()
    with OmSession(om) as session:
        run = session.submit({"x": x}, stream.npu_stream)
        with pytest.raises(OmError, match="fetch the result of the run before"):
            session.run({"x": x})
        np.testing.assert_allclose(run.result()["y"], linear(model, x), atol=HALF)
        with pytest.raises(OmError, match="fetched already"):
            run.result()
    assert torch.ones(3, device="npu").sum().item() == 3


def test_a_closed_session_leaves_no_memory(batches: tuple[Path, Path]) -> None:
    free = torch.npu.mem_get_info()[0]
    for _ in range(3):
        with OmSession(batches[1]) as session:
            assert torch.npu.mem_get_info()[0] < free
            session.run({"x": random(2, FEATURES)})
        session.close()
    assert torch.npu.mem_get_info()[0] == free


@pytest.mark.parametrize("runs", [False, True], ids=["idle", "running"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in a thread without a context"])
def test_a_session_that_is_dropped_leaves_no_memory_and_says_so(
    batches: tuple[Path, Path], runs: bool, elsewhere: bool
) -> None:
    """Also behind a run that nobody waited for."""
    free, stream = torch.npu.mem_get_info()[0], torch.npu.Stream()
    sessions = [OmSession(batches[1])]
    assert torch.npu.mem_get_info()[0] < free
    if runs:
        sessions[0].submit({"x": random(2, FEATURES)}, stream.npu_stream)

    def drop() -> None:
        sessions.clear()
        gc.collect()  # a run and its session know each other

    with pytest.warns(ResourceWarning, match=rf"the offline model {batches[1]} was not closed"):
        if elsewhere:
            thread = threading.Thread(target=drop)
            thread.start()
            thread.join()
        else:
            drop()
    assert torch.npu.mem_get_info()[0] == free
    assert torch.ones(3, device="npu").sum().item() == 3  # in its own context


def test_a_session_that_is_closed_does_not_say_so(batches: tuple[Path, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with OmSession(batches[1]) as session:
            session.run({"x": random(2, FEATURES)})
        del session
        gc.collect()


@pytest.mark.parametrize(
    "feeds, message",
    [
        ({}, "the input x is missing"),
        ({"x": np.zeros((2, 16), np.float32), "z": np.zeros(1)}, r"no inputs \['z'\]"),
        ({"x": np.zeros((2, 16))}, "is float64, and the model takes float32"),
        ({"x": np.zeros((2, 15), np.float32)}, r"has the shape \(2, 15\), and the model takes \(-1, 16\)"),
        ({"x": np.zeros((16,), np.float32)}, r"has the shape \(16,\)"),
        ({"x": np.zeros((3, 16), np.float32)}, r"batches are \[3\], and the model has profiles for \(1, 2, 4\)"),
    ],
)
def test_wrong_feeds(batches: tuple[Path, Path], feeds: dict[str, np.ndarray], message: str) -> None:
    with OmSession(batches[1]) as session:
        with pytest.raises(OmError, match=message):
            session.run(feeds)
        session.run({"x": random(1, FEATURES)})  # and goes on


def test_files_that_are_no_models(fixed: tuple[Path, Path], tmp_path: Path) -> None:
    whole = fixed[1].read_bytes()
    middle = len(whole) - 40
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    contents = {
        "truncated": whole[:-1],
        "damaged": damaged,
        "an offline model of CANN's own atc": b"IMOD" + bytes(300),
        "no offline model": b"",
    }
    free = torch.npu.mem_get_info()[0]
    for i, (message, content) in enumerate(contents.items()):
        path = tmp_path / f"{i}.om"
        path.write_bytes(content)
        with pytest.raises(OmError, match=message if ON_EMULATOR else "aclmdlLoadFromFile failed"):
            OmSession(path)
    with pytest.raises(OmError, match="aclmdlLoadFromFile failed with 145002"):
        OmSession(tmp_path / "missing.om")
    with pytest.raises(OmError, match="aclrtSetDevice failed"):
        OmSession(fixed[1], device_id=63)
    assert torch.npu.mem_get_info()[0] == free


@pytest.mark.skipif(not ON_EMULATOR, reason="needs the atc of another chip")
def test_a_model_of_another_chip(tmp_path: Path, soc: str) -> None:
    model, other = offline_models.save_linear(tmp_path / "m.onnx", batch=1), offline_models.OTHER[soc]
    with pytest.raises(OmError, match=f"converted for {other}, and this chip is {soc}"):
        OmSession(offline_models.convert_on(other, model))


PROGRAM = """
import sys
import numpy as np
from ascend.om import OmSession
with OmSession(sys.argv[1]) as session:
    y = session.run({"x": np.ones((2, 16), np.float32)})["y"]
assert y.shape == (2, 8)
assert not {"torch", "torch_npu"} & set(sys.modules)
print("done")
"""


UNCLOSED = """
import sys
import numpy as np
MORE
from ascend.om import OmSession
session = OmSession(sys.argv[1])
feeds = {"x": np.ones((2, 16), np.float32)}
assert session.run(feeds)["y"].shape == (2, 8)
if "torch" in sys.modules:
    session.submit(feeds, torch.npu.current_stream().npu_stream)
    assert torch.ones(3, device="npu").sum().item() == 3
print("done")
"""


@pytest.mark.parametrize("more", ["", "import torch, torch_npu"], ids=["alone", "beside torch"])
@pytest.mark.parametrize("after", ["", "session.itself = session"], ids=["", "in a circle"])
def test_a_process_that_ends_without_closing(fixed: tuple[Path, Path], more: str, after: str) -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", UNCLOSED.replace("MORE", more) + after]
    done = subprocess.run([*command, fixed[1]], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Exception" not in done.stderr and "ResourceWarning" not in done.stderr


def test_a_process_without_torch(fixed: tuple[Path, Path]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(fixed[1])], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
