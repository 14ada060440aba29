"""CLIP as offline models on the chip: converted by atc, run by OmSession, with the answers of torch's float32."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runners.clip import CLIPInferenceService, run
from runners.offline.converter import ModelConverter
from scripts.demo_clip.deployment import main, scene_pairs
from scripts.demo_clip.train import DEMO_CLIP
from tests.on_npu import offline_models
from tests.on_npu.offline_models import OTHER, SOC

LOGITS = 0.1  # of up to 30, in float16


def test_deployed_with_profiles(tmp_path: Path) -> None:
    """65 pictures and captions: eight times the profile of 8, and that of 1, of both towers."""
    main("deploy.sh", "", ["--output-dir", str(tmp_path), "--dynamic-batch", "--scenes", "65", "--no-benchmark"])
    report = json.loads((tmp_path / "deploy_report.json").read_text())
    assert report["result"] == "deployed"
    assert [text.partition(":")[0] for text in report["warnings"]] == ["the chip is emulated"] * bool(SOC)
    config = report["conversion"]["config"]
    assert config["soc_version"] == report["environment"]["chip"] == torch.npu.get_device_name(0)
    assert config["text_tower"]["batch_sizes"] == config["image_tower"]["batch_sizes"] == [1, 2, 4, 8]
    accuracy = report["accuracy"]
    assert {"cpu_onnx", "npu_fp32", "npu_fp16", "npu_om"} == accuracy.keys()
    assert all(row["passed"] and row["changed"] == 0 and row["right"] > 0.95 for row in accuracy.values())
    assert 1e-4 < accuracy["npu_om"]["max_logit_error"] < LOGITS  # it computes in float16


@pytest.mark.parametrize("count", [3, 5])
def test_bytes_that_the_chip_normalises(count: int, bytes_folder: Path) -> None:
    pairs = scene_pairs(5)
    ours = CLIPInferenceService(str(bytes_folder), backend="om")
    assert ours.device == "npu:0" and ours.backend.takes_bytes
    found = ours.batch_predict(pairs.pictures[:count], pairs.captions, count)
    ours.close()
    theirs = CLIPInferenceService(str(DEMO_CLIP), "cpu")
    expected = theirs.batch_predict(pairs.pictures[:count], pairs.captions, count)
    np.testing.assert_allclose([r["logits"] for r in found], [r["logits"] for r in expected], atol=LOGITS)
    assert [r["best_match"] for r in found] == list(pairs.captions[:count])


def put(tower: bytes, folder: Path, is_named: bool) -> None:
    """Another file in the place of the image tower, which the settings name or not."""
    (folder / "image_tower.om").write_bytes(tower)
    config = json.loads((folder / "model_config.json").read_text())
    if is_named:
        config["files"]["image_tower.om"] = hashlib.sha256(tower).hexdigest()
    (folder / "model_config.json").write_text(json.dumps(config))


def test_files_that_cannot_be_run_are_one_line(
    bytes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another chip, cut short, and CANN's own where the chip is emulated."""
    folder, picture = tmp_path / "om", tmp_path / "a.png"
    shutil.copytree(bytes_folder, folder)
    Image.new("RGB", (9, 9)).save(picture)
    whole = (folder / "image_tower.om").read_bytes()
    cases = [(whole[:-1], False, "image_tower.om, which is not the file that was written with it")]
    if SOC:
        model = offline_models.convert_on(OTHER[SOC], offline_models.save_linear(tmp_path / "m.onnx", batch=1))
        cases += [
            (whole[:-1], True, "truncated"),
            (b"IMOD" + bytes(300), True, "an offline model of CANN's own atc"),
            (model.read_bytes(), True, f"it was converted for {OTHER[SOC]}, and this chip is {SOC}"),
        ]
    for tower, is_named, message in cases:
        put(tower, folder, is_named)
        with pytest.raises(SystemExit) as end:
            run.main("", "", ["--backend", "om", "--model", str(folder), "--image", str(picture)])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and message in line


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For four pictures or texts, of which the service makes what is asked."""
    folder = tmp_path_factory.mktemp("om")
    ModelConverter().convert_clip_model(str(DEMO_CLIP), folder, batch_size=4, aipp=True)
    return folder
