"""Offline models that a C++ program builds by the interface of GE (`ge_build.cpp`)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ascend.om import OmSession
from tests.on_npu import offline_models
from tests.on_npu.offline_models import FEATURES, HALF, linear, random


@pytest.fixture(scope="module")
def ge_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not offline_models.SOC:
        pytest.skip("links to the emulator's libraries")
    program = tmp_path_factory.mktemp("ge") / "ge_build"
    source = Path(__file__).with_name("ge_build.cpp")
    places = [f"-L{path}" for path in os.environ["LD_LIBRARY_PATH"].split(os.pathsep) if path]
    # As for programs of CANN, what the libraries need themselves is found when the program starts.
    libraries = ["-lge_compiler", "-lfmk_onnx_parser", "-lascendcl", "-lgraph", "-lcann_emulator"]
    link = ["-Wl,--unresolved-symbols=ignore-in-shared-libs", *places, *libraries]
    subprocess.run(["g++", "-std=c++17", source, *link, "-o", program], check=True)
    return program


def test_a_model_is_built_by_the_interface_of_ge(ge_build: Path, tmp_path: Path) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx")
    options = ["input_shape=x:-1,16", "ge.dynamicBatchSize=1,3", "ge.exec.precision_mode=must_keep_origin_dtype"]
    done = subprocess.run([ge_build, model, tmp_path / "m", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    x = random(3, FEATURES)
    with OmSession(tmp_path / "m.om") as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], linear(model, x), atol=HALF)


@pytest.mark.parametrize(
    "option, message",
    [
        ("ge.noSuchOption=1", "build: .*E10001.*ge.noSuchOption is invalid. Reason: the option is not emulated"),
        ("input_shape=x:1,15,2", "build: .*E10049"),
        ("ge.socVersion=Ascend1", "build: .*E10001.*soc_version"),
    ],
)
def test_options_of_the_interface(ge_build: Path, tmp_path: Path, option: str, message: str) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx")
    done = subprocess.run([ge_build, model, tmp_path / "m", option], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(message, done.stdout)
    assert not (tmp_path / "m.om").exists()
