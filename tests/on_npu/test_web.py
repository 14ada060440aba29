"""The page's worker on the second chip, which is not that of a thread that nobody told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ascend.device import DeviceManager
from runners.hidream.arguments import DEMO_DESCRIPTION, DEMO_IMAGE, DEMO_INSTRUCTION
from runners.hidream.edits import Edit
from runners.report import Report
from runners.web.editing import Edited, EditingModel, Settings
from runners.web.worker import Cancelled, OnStep, Worker
from tests.programs import ROOT

FOLDER = ROOT / "examples/hidream_e1"
MEMORY_LEFT = 2**20  # bytes


def test_edits_are_cancelled_and_made_again_on_the_chip_that_was_chosen() -> None:
    if torch.npu.device_count() < 2:
        pytest.skip("there is one chip")
    manager = DeviceManager("npu:1")
    chosen = {"memory": "auto", "memory_limit": None, "FA": True, "dynamo": False, "dtype": manager.dtype}
    chosen |= {"model_path": None, "edit_lora": None, "refiner_path": None, "llama_path": None}
    model = EditingModel("e1.1", chosen, FOLDER, manager, Report())
    edit = Edit(Path(FOLDER / DEMO_IMAGE), DEMO_INSTRUCTION, DEMO_DESCRIPTION, 3, "x")
    settings = Settings("", 3, 1.5, 1.5, 0.3, True)
    worker, steps = Worker(manager), []

    def run(progress: OnStep) -> Edited:
        return worker.run("me", model, lambda loaded, on_step: model.edit(loaded, edit, settings, on_step), progress)

    before = manager.memory_stats()["allocated"]
    first = run(lambda step, count: steps.append((step, count)))
    assert steps == [(1, 3), (2, 3), (3, 3)] and first.about["device"]["index"] == 1
    with pytest.raises(Cancelled):
        run(lambda step, count: worker.cancel("me"))
    assert run(lambda step, count: None).image.tobytes() == first.image.tobytes()
    worker.close()
    assert manager.memory_stats()["allocated"] - before < MEMORY_LEFT
