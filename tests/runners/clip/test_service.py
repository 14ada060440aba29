"""The service: what A.1 of the system to match promises, and what its own code did not keep."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ascend.device import DeviceError
from processors.kernels.attention import attention
from processors.models import clip
from runners.cli import UserError
from runners.clip import CLIPInferenceService
from runners.clip import service as service_module
from runners.clip.inputs import prepare_pictures, prepare_texts
from tests.tiny_clip import CLIP_TOKENS, SIGLIP_TOKENS, count_calls

TEXTS = ["a cat", "a dog on a red sofa", "nothing"]
KEYS = {"texts", "probabilities", "best_match", "best_score", "inference_time_ms", "device"}
BENCHMARK_KEYS = {
    "mean_ms", "std_ms", "min_ms", "max_ms", "p50_ms", "p95_ms", "p99_ms", "throughput_per_sec", "device"
}  # fmt: skip


@pytest.fixture(params=["clip", "siglip"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, clip_dir: Path, siglip_dir: Path) -> Path:
    return {"clip": clip_dir, "siglip": siglip_dir}[kind]


@pytest.fixture
def service(folder: Path) -> CLIPInferenceService:
    return CLIPInferenceService(str(folder), device="cpu")


def test_probabilities_are_those_of_transformers(
    kind: str, folder: Path, service: CLIPInferenceService, pictures: list[Image.Image]
) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    padding = "max_length" if kind == "siglip" else True
    inputs = processor(text=TEXTS, images=pictures, padding=padding, return_tensors="pt")
    if kind == "siglip":
        inputs.pop("attention_mask")  # it was trained without one
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    expected = logits.softmax(dim=1) if kind == "clip" else logits.sigmoid()
    results = service.batch_predict(pictures, TEXTS)
    np.testing.assert_allclose([r["probabilities"] for r in results], expected, rtol=1e-4)
    assert np.ptp(expected.numpy(), axis=0).max() > 0.01  # pictures differ
    for result in results:
        assert result.keys() >= KEYS
        assert result["best_match"] == TEXTS[int(np.argmax(result["probabilities"]))]
        assert result["best_score"] == max(result["probabilities"])
        assert result["scoring"] == ("softmax" if kind == "clip" else "sigmoid")
        assert kind == "siglip" or math.isclose(sum(result["probabilities"]), 1, rel_tol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 20])
def test_a_batch_is_one_forward(service: CLIPInferenceService, pictures: list[Image.Image], batch_size: int) -> None:
    alone = [service.predict(picture, TEXTS) for picture in pictures]
    calls = count_calls(service.backend)
    together = service.batch_predict(pictures, TEXTS, batch_size)
    assert len(calls.images) == math.ceil(len(pictures) / batch_size)
    assert sum(calls.images) == len(pictures) and max(calls.images) <= batch_size
    assert calls.texts == [len(TEXTS)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-4)


def test_encoded_texts_are_not_encoded_again(service: CLIPInferenceService, pictures: list[Image.Image]) -> None:
    encoded = service.encode_texts(TEXTS)
    calls = count_calls(service.backend)
    assert service.batch_predict(pictures, encoded)[3]["logits"] == pytest.approx(
        service.batch_predict(pictures, TEXTS)[3]["logits"]
    )
    assert calls.texts == [len(TEXTS)]


def test_encoded_texts_may_have_any_length(service: CLIPInferenceService, pictures: list[Image.Image]) -> None:
    raw = service.encode_texts(TEXTS, normalize=False)
    assert not torch.allclose(raw.features.norm(dim=1), torch.ones(len(TEXTS)), atol=0.1)
    for one, other in zip(service.batch_predict(pictures, raw), service.batch_predict(pictures, TEXTS), strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-4)


def test_a_generator_is_taken_as_its_list_a_batch_at_a_time(
    service: CLIPInferenceService, pictures: list[Image.Image]
) -> None:
    opened: list[int] = []
    calls = count_calls(service.backend)

    def generated() -> Iterator[Image.Image]:
        for number, picture in enumerate(pictures):
            assert number < 3 * (1 + len(calls.images)), "the batch before it has been computed"
            opened.append(number)
            yield picture

    found = service.batch_predict(generated(), (text for text in TEXTS), batch_size=3)
    assert opened == [*range(len(pictures))]
    for one, other in zip(found, service.batch_predict(pictures, TEXTS, batch_size=3), strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-4)
    features = service.extract_image_features(picture for picture in pictures)
    torch.testing.assert_close(features, service.extract_image_features(pictures))
    assert service.batch_predict(iter(()), TEXTS) == []
    with pytest.raises(ValueError, match="there is no picture"):
        service.extract_image_features(iter(()))


def test_a_single_picture_is_no_list(
    service: CLIPInferenceService, pictures: list[Image.Image], tmp_path: Path
) -> None:
    pictures[0].save(tmp_path / "picture.png")
    for one in (str(tmp_path / "picture.png"), tmp_path / "picture.png", pictures[0]):
        with pytest.raises(ValueError, match="a list is wanted, also of a single one, not "):
            service.batch_predict(one, TEXTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a list is wanted"):
        service.clip_scores("ab", ["a", "b"])
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be 1 or more, not {size}"):
            service.batch_predict(pictures, TEXTS, size)


def test_closing_twice_is_closing_once(service: CLIPInferenceService, pictures: list[Image.Image]) -> None:
    service.close()
    service.close()
    with pytest.raises(RuntimeError, match="the model is closed"):
        service.predict(pictures[0], TEXTS)


def test_features_have_length_one_unless_asked(service: CLIPInferenceService, pictures: list[Image.Image]) -> None:
    for extract, inputs in (
        (service.extract_image_features, pictures[:3]),
        (service.extract_text_features, TEXTS),
    ):
        features, raw = extract(inputs), extract(inputs, normalize=False)
        assert features.shape == raw.shape == (3, features.shape[1])
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), features)
    assert service.extract_image_features(pictures[0]).shape[0] == service.extract_text_features("one").shape[0] == 1


def test_a_text_that_is_too_long_is_cut_and_that_is_said(
    kind: str, service: CLIPInferenceService, pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    long = "word " * 50
    with caplog.at_level(logging.WARNING, "runners"):
        result = service.predict(pictures[0], [long, "short"])
        service.predict(pictures[0], [long, "short"])
    assert result["truncated_texts"] == [long]
    limit = CLIP_TOKENS if kind == "clip" else SIGLIP_TOKENS
    assert [r.message for r in caplog.records if r.name.startswith("runners")] == [
        f"only the first {limit} tokens of this text count: {long[:60]}..."
    ]


def test_no_picture_is_refused(service: CLIPInferenceService) -> None:
    with pytest.raises(ValueError, match="there is no picture"):
        service.extract_image_features([])
    assert service.batch_predict([], TEXTS) == []


@pytest.mark.parametrize("texts", [[], ["a", ""], ["  "], "a cat", [1]])
def test_texts_that_say_nothing_are_refused(clip_dir: Path, texts: Any) -> None:
    with pytest.raises(ValueError, match="texts must be a list"):
        CLIPInferenceService(str(clip_dir), "cpu").predict(Image.new("RGB", (9, 9)), texts)


def test_benchmark_has_the_promised_keys(
    clip_dir: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole requests: pictures and texts are prepared in each."""
    service = CLIPInferenceService(str(clip_dir), "cpu")
    calls, prepared = count_calls(service.backend), []
    for each in (prepare_pictures, prepare_texts):
        monkeypatch.setattr(
            service_module, each.__name__, lambda *args, each=each: prepared.append(each) or each(*args)
        )
    result = service.benchmark(pictures[0], TEXTS, num_runs=3, warmup_runs=2)
    assert result.keys() >= BENCHMARK_KEYS and result["first_ms"] > 0
    assert calls.images == [1] * 5 and calls.texts == [len(TEXTS)] * 5
    assert len(prepared) == 10
    assert result["min_ms"] <= result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["percentiles_trusted"] == []


def test_precision(clip_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = CLIPInferenceService(str(clip_dir), "cpu", use_fp16=True)
    assert next(service.backend.images.parameters()).dtype == torch.float32
    assert "computing in float32" in caplog.text
    service = CLIPInferenceService(str(clip_dir), "cpu", dtype=torch.bfloat16)
    assert next(service.backend.images.parameters()).dtype == torch.bfloat16
    assert service.extract_text_features("a").dtype == torch.float32
    with pytest.raises(ValueError, match="two precisions"):
        CLIPInferenceService(str(clip_dir), "cpu", use_fp16=True, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="does not compute in torch.int8"):
        CLIPInferenceService(str(clip_dir), "cpu", dtype=torch.int8)


def test_an_absent_device_is_one_error(clip_dir: Path) -> None:
    for name in ("npu:99", "cuda:99"):
        with pytest.raises(DeviceError, match=f"device '{name}' is not there"):
            CLIPInferenceService(str(clip_dir), name)
    with pytest.raises(DeviceError, match="unknown"):
        CLIPInferenceService(str(clip_dir), "abacus")


def test_other_models_and_missing_ones_are_refused(tiny_sd_dir: Path, tmp_path: Path, clip_dir: Path) -> None:
    with pytest.raises(UserError, match="is of the kind 'clip_text_model': clip or siglip is wanted"):
        CLIPInferenceService(str(tiny_sd_dir / "text_encoder"), "cpu")
    with pytest.raises(UserError, match="there is no folder"):
        CLIPInferenceService(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(UserError, match="lacks model_config.json"):
        CLIPInferenceService(str(clip_dir), "cpu", backend="onnx")
    with pytest.raises(ValueError, match="backend 'tensorrt' is unknown"):
        CLIPInferenceService(str(clip_dir), backend="tensorrt")


def test_fused_kernels_compute_the_same(
    kind: str, folder: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = (CLIPInferenceService(str(folder), "cpu", kernels=kernels) for kernels in (False, True))
    done = fused.backend.flags["FA"][{"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]]
    # SigLIP's pictures are pooled by an attention of one query, which is torch's own module.
    pooling = {"clip": "", "siglip": "; not covered: 1 attention (MultiheadAttention)"}[kind]
    assert done == f"4 attentions{pooling}"
    calls = []
    monkeypatch.setattr(clip, "attention", lambda *args: calls.append(args) or attention(*args))
    np.testing.assert_allclose(
        fused.predict(pictures[0], TEXTS)["logits"], plain.predict(pictures[0], TEXTS)["logits"], atol=1e-5
    )
    assert len(calls) == 4


@pytest.mark.slow
def test_graphs_compute_the_same_and_are_few(clip_dir: Path, pictures: list[Image.Image]) -> None:
    plain, compiled = (CLIPInferenceService(str(clip_dir), "cpu", compiled=on) for on in (False, True))
    assert compiled.backend.flags["dynamo"] == {"image tower": "inductor", "text tower": "inductor"}
    for texts in (TEXTS, TEXTS[:2], [*TEXTS, "one more"]):
        for one, other in zip(
            compiled.batch_predict(pictures, texts), plain.batch_predict(pictures, texts), strict=True
        ):
            np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-4)
    assert len(compiled.backend.images.forward.graphs) == 1  # the last batch, of 3, was filled up
    assert len(compiled.backend.texts.forward.graphs) == 2
