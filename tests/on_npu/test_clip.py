"""CLIP on the chip: the CPU's answers in every precision, by fused kernels, and as graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runners.clip import CLIPInferenceService
from tests.on_npu.helpers import FLOATS
from tests.tiny_clip import count_calls, save_tiny_clip, save_tiny_siglip

TEXTS = ["a cat", "a dog on a red sofa", "nothing"]
TOLERANCE = {torch.float32: 0.05, torch.float16: 0.1, torch.bfloat16: 0.6}  # of logits up to 14; convolutions are HF32


@pytest.fixture(scope="module", params=[save_tiny_clip, save_tiny_siglip], ids=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("models") / "model")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).resize((50, 60)) for _ in range(5)]


def logits(service: CLIPInferenceService) -> np.ndarray:
    return np.array([result["logits"] for result in service.batch_predict(pictures(), TEXTS, 4)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_answers_are_those_of_the_cpu(folder: Path, dtype: torch.dtype) -> None:
    service = CLIPInferenceService(str(folder), "npu", dtype=dtype)
    calls = count_calls(service.backend)
    found = logits(service)
    assert calls.images == [4, 1] and calls.texts == [3]
    np.testing.assert_allclose(found, logits(CLIPInferenceService(str(folder), "cpu")), atol=TOLERANCE[dtype])
    assert service.extract_image_features(pictures()).device.type == "npu"


def test_fused_kernels_and_graphs(folder: Path) -> None:
    model = str(folder)
    service = CLIPInferenceService(model, "auto", use_fp16=True, kernels=True, compiled=True)
    assert service.device.startswith("npu") and service.backend.flags["dynamo"]["image tower"] == "torchair"
    np.testing.assert_allclose(
        logits(service), logits(CLIPInferenceService(model, "cpu")), atol=TOLERANCE[torch.float16]
    )


def test_benchmark_counts_memory_of_its_own_run(tmp_path: Path) -> None:
    service = CLIPInferenceService(str(save_tiny_clip(tmp_path)), "npu")
    big = torch.empty(2**26, dtype=torch.uint8, device="npu")
    del big
    result = service.benchmark(pictures()[0], TEXTS, num_runs=2, warmup_runs=1)
    assert 0 < result["memory_allocated_mb"] <= result["memory_peak_mb"] < 64
    assert result["memory_reserved_mb"] >= 64
