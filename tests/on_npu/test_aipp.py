"""What a chip does to the bytes of pictures before an offline model sees them, against arithmetic.

The rules are in config_file_template.md and CSC_config.md of hicann/ge, `docs/zh/user_guides/atc_tools/AIPP`; what atc
refuses of them is in `test_atc.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ascend.om import OmSession
from tests.on_npu import offline_models
from tests.on_npu.offline_models import HALF, weights_of


@pytest.fixture(scope="module")
def soc() -> str:
    return torch.npu.get_device_name(0)


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
# YUV to RGB of a JPEG, and RGB to YUV of BT-601 NARROW
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
