"""`convert_to_om.py onnx` on the chip, as who types it sees it: what is bad is one line, an exit code and no file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ascend.om import OmSession
from runners.offline.run import main
from tests.on_npu import offline_models
from tests.on_npu.offline_models import FEATURES, HALF, linear, random

ON_EMULATOR = "CANN_EMULATOR_SOC" in os.environ


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Converts a model into out/m.om: the exit code, and the lines on stderr."""

    def run(model: Path, *options: str) -> tuple[int, list[str]]:
        code = 0
        try:
            main(
                "convert_to_om.py", "", ["onnx", "--model", str(model), "--output", str(tmp_path / "out/m"), *options]
            )
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("opset", [11, 17, 18])
def test_opsets_that_cann_reads(convert: Callable[..., tuple[int, list[str]]], tmp_path: Path, opset: int) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx", opset=opset)
    assert convert(model, "--input-shape", f"x:-1,{FEATURES}", "--dynamic-dims", "1;3") == (0, [])
    x = random(3, FEATURES)
    with OmSession(tmp_path / "out/m.om") as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], linear(model, x), atol=HALF)


def newer(path: Path) -> Path:
    return offline_models.save_linear(path, batch=2, opset=21)


def without_its_weights(path: Path) -> Path:
    model = onnx.load(offline_models.save_linear(path, batch=2))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_name("weights.bin").unlink()
    return path


def cut_short(path: Path) -> Path:
    whole = offline_models.save_linear(path, batch=2).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def open_batch(path: Path) -> Path:
    return offline_models.save_linear(path)


@pytest.mark.parametrize(
    "make, options, said",
    [
        (newer, (), "E16002: "),
        (without_its_weights, (), "E10041: "),
        (cut_short, (), "E10041: "),
        (open_batch, (), "E10001: "),
        (open_batch, ("--input-shape", "y:1,16"), "E10016: "),
        (open_batch, ("--input-shape", "x:1,2,3"), "E10049: "),
        (open_batch, ("--input-shape", "x:1,16", "--precision-mode", "fp16"), "E10001: "),
    ],
)
def test_what_atc_refuses_is_in_its_own_words(
    convert: Callable[..., tuple[int, list[str]]],
    tmp_path: Path,
    make: Callable[[Path], Path],
    options: tuple[str, ...],
    said: str,
) -> None:
    code, lines = convert(make(tmp_path / "m.onnx"), *options)
    assert code == 1
    assert lines[-1].startswith("error: atc ended with exit code ")
    assert any(line.startswith(said) for line in lines) or not ON_EMULATOR
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.atc.log"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--input-shape", "x:-1,16"), "no profile says what it stands for: give dynamic_dims"),
        (("--input-shape", "x:1~4,16"), "--input-shape: '1~4,16' has to be whole numbers"),
        (("--input-shape", "x:-1,16", "--dynamic-dims", "2"), "there are 1 profiles, and atc takes 2 to 100"),
        (("--soc-version", "Ascend310p3"), "'Ascend310p3' is spelt Ascend310P3"),
        (("--soc-version", "Ascend910B"), "is a family of chips"),
    ],
)
def test_what_atc_is_not_asked_for(
    convert: Callable[..., tuple[int, list[str]]], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, lines = convert(open_batch(tmp_path / "m.onnx"), *options)
    assert code and message in lines[-1] and len(lines) == 1
    assert not list(tmp_path.glob("out/*.om"))


def test_a_path_with_a_space(convert: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    (tmp_path / "my models").mkdir()
    model = offline_models.save_linear(tmp_path / "my models/m.onnx", batch=2)
    code, (line,) = convert(model)
    assert code == 1 and "my models/m.onnx', which has ' '" in line
    shutil.move(model, tmp_path / "m.onnx")
    assert convert(tmp_path / "m.onnx")[0] == 0
