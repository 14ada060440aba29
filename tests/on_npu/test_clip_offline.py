"""CLIP as offline models on the chip: converted by atc, run by OmSession, with the answers of torch's float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runners.clip import CLIPInferenceService
from runners.offline.converter import ModelConverter
from scripts.demo_clip.deployment import main, scene_pairs
from scripts.demo_clip.train import DEMO_CLIP
from tests.on_npu.offline_models import SOC

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


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For four pictures or texts, of which the service makes what is asked."""
    folder = tmp_path_factory.mktemp("om")
    ModelConverter().convert_clip_model(str(DEMO_CLIP), folder, batch_size=4, aipp=True)
    return folder
