"""The trainer on emulated chips: a 910B3 trains as the CPU does, alone and by two; a 310P is for inference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runners.training.run import main
from tests.programs import ROOT, environment
from tests.tiny_models import save_tiny_sd, small_unet
from tests.training_work import PROGRAM, arguments, losses, train, write_pictures

ON_NPU = ("--device", "npu")
trains = pytest.mark.usefixtures("training_chip")


@pytest.fixture
def training_chip(chip: str) -> None:
    if chip.startswith("Ascend310P"):
        pytest.skip("made for inference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd(tmp_path_factory.mktemp("models") / "small", make_unet=small_unet)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("training") / "pictures")


def test_a_chip_for_inference_says_so(
    chip: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not chip.startswith("Ascend310P"):
        pytest.skip("trains")
    with pytest.raises(SystemExit) as ended:
        main(None, PROGRAM.parent, arguments(data, model, tmp_path / "made", *ON_NPU))
    assert ended.value.code == 2
    assert "made for inference" in capsys.readouterr().err.splitlines()[-1]


@trains
@pytest.mark.parametrize("more", [(), ("--full", "--no-ema")], ids=["lora", "full"])
def test_float32_has_the_losses_of_the_cpu(more: tuple[str, ...], model: Path, data: Path, tmp_path: Path) -> None:
    cpu = train(data, model, tmp_path / "cpu", *more, steps=6)
    npu = train(data, model, tmp_path / "npu", *ON_NPU, "--dtype", "float32", *more, steps=6)
    # HF32 convolutions, as torch_npu has them by default, round their operands to 11 bits.
    torch.testing.assert_close(losses(npu), losses(cpu), rtol=2e-3, atol=0)


@trains
@pytest.mark.parametrize("preset", ["speed", "balanced", "memory", "full"])
def test_each_preset_trains_in_bfloat16(preset: str, model: Path, data: Path, tmp_path: Path) -> None:
    cpu = train(data, model, tmp_path / "cpu", steps=4)
    npu = train(data, model, tmp_path / "npu", *ON_NPU, "--preset", preset, steps=4)
    torch.testing.assert_close(losses(npu), losses(cpu), rtol=2e-2, atol=0)


@trains
def test_float16_scales_the_loss(model: Path, data: Path, tmp_path: Path) -> None:
    cpu = train(data, model, tmp_path / "cpu", steps=4)
    npu = train(data, model, tmp_path / "npu", *ON_NPU, "--dtype", "float16", steps=4)
    torch.testing.assert_close(losses(npu), losses(cpu), rtol=2e-2, atol=0)


@trains
@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--full", "--no-ema")], ids=["ddp", "fsdp"])
def test_two_chips_have_the_losses_of_one(more: tuple[str, ...], model: Path, data: Path, tmp_path: Path) -> None:
    one = train(data, model, tmp_path / "one", *ON_NPU, "--dtype", "float32", *more, steps=20)
    words = arguments(data, model, tmp_path / "two", *ON_NPU, "--dtype", "float32", "--batch_size", 1, *more, steps=20)
    command = [sys.executable, str(ROOT / "examples/launch.py"), "--device_list", "0,1", "--", str(PROGRAM), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-3, atol=0)
