"""HiDream-E1 and Stable Diffusion as the page uses them, and what the page says."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ascend.device import DeviceManager
from runners.cli import UserError
from runners.hidream.arguments import DEMO_DESCRIPTION, DEMO_IMAGE, DEMO_INSTRUCTION
from runners.hidream.edits import Edit
from runners.report import Report
from runners.web import run as program
from runners.web.drawing import Drawing, DrawingModel
from runners.web.editing import EditingModel, Settings
from runners.web.texts import LANGUAGES, TEXTS, text
from runners.web.worker import Cancelled
from tests.programs import ROOT

FOLDER = ROOT / "examples/hidream_e1"
CHOSEN = {"memory": "auto", "memory_limit": None, "FA": False, "dynamo": False, "dtype": torch.float32}


@pytest.fixture(scope="module")
def editing() -> EditingModel:
    files = {"model_path": None, "edit_lora": None, "refiner_path": None, "llama_path": None}
    return EditingModel("e1-full", CHOSEN | files, FOLDER, DeviceManager("cpu"), Report())


def settings(**changes: Any) -> Settings:
    values = {"steps": 3, "guidance_scale": 1.5, "image_guidance_scale": 1.5, "refine_strength": 0.3}
    return Settings(**({"negative_prompt": "", "clip_cfg_norm": True} | values | changes))


def demo_edit(image: Path = FOLDER / DEMO_IMAGE) -> Edit:
    return Edit(image, DEMO_INSTRUCTION, DEMO_DESCRIPTION, 3, "x")


def test_an_edit_ended_between_steps_leaves_nothing_behind(editing: EditingModel) -> None:
    loaded, steps = editing.load(), []

    def end_at_second(step: int, count: int) -> None:
        steps.append((step, count))
        if step == 2:
            raise Cancelled

    expected = editing.edit(loaded, demo_edit(), settings(), lambda step, count: None)
    with pytest.raises(Cancelled):
        editing.edit(loaded, demo_edit(), settings(), end_at_second)
    assert steps == [(1, 3), (2, 3)]
    again = editing.edit(loaded, demo_edit(), settings(), lambda step, count: None)
    assert np.array_equal(again.image, expected.image)
    assert again.about["family"] == "HiDream-E1-Full" and again.about["input_image"] == "shapes.png"
    other = editing.edit(loaded, demo_edit(), settings(refine_strength=0.0), lambda step, count: None)
    assert not np.array_equal(other.image, expected.image) and other.about["refine_strength"] == 0
    assert editing.args.steps == 28  # nobody's settings become another's


def test_a_picture_that_cannot_be_read_is_named_without_its_folder(editing: EditingModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^cannot read the picture absent.png") as error:
        editing.edit((None, {}), demo_edit(tmp_path / "absent.png"), settings(), lambda step, count: None)
    assert str(tmp_path) not in str(error.value)


def test_drawings(tiny_sd_dir: Path) -> None:
    model = DrawingModel(CHOSEN | {"model_path": tiny_sd_dir}, ROOT / "examples/sd2.1", DeviceManager("cpu"), Report())
    loaded, steps = model.load(), []
    drawing = Drawing(["a circle"], "", 2, 2.0, 2, 7)
    drawn, warnings = model.draw(loaded, drawing, lambda step, count: steps.append((step, count)))
    assert [each.about["seed"] for each in drawn] == [7, 8] and steps == [(1, 2), (2, 2)] and not warnings
    with pytest.raises(UserError, match="a negative prompt has no effect"):
        model.draw(loaded, Drawing(["a circle"], "red", 2, 1.0, 1, 0), lambda step, count: None)


def test_every_text_is_in_every_language() -> None:
    for key, texts in TEXTS.items():
        assert len(texts) == len(LANGUAGES) and all(texts)
        fields = [{name for _, name, _, _ in string.Formatter().parse(each) if name} for each in texts]
        assert fields.count(fields[0]) == len(fields), key
    assert text("step", "zh", step=1, steps=2) == "第 1/2 步"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llama_path", "x"], "--llama_path has no effect on the demo model"),
        (["--edit_lora", "x.safetensors"], "--edit_lora is for HiDream-I1-Full in --e1_full_path"),
        (["--port", "http"], "must be a whole number"),
        (["--language", "de"], "invalid choice: 'de'"),
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        program.parse_arguments("", arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
