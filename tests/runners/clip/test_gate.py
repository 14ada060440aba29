"""The gate counts changed answers and lets nothing through that is too far from the reference."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from runners.clip import CLIPInferenceService
from runners.clip.gate import CHOICES, LIMITS, Answers, Limits, Pairs, ask, compare

COUNT = 1000
PICTURE = Image.new("RGB", (8, 8))


def answers() -> Answers:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(COUNT, 8, generator=generator)) for _ in range(2))
    return Answers(images, texts, torch.randn(COUNT, CHOICES, generator=generator))


def changed(reference: Answers, count: int) -> Answers:
    """Of `count` pictures another caption is the best."""
    logits = reference.logits.clone()
    rows = torch.arange(count)
    logits[rows, (logits[rows].argmax(dim=1) + 1) % CHOICES] = 99.0
    return replace(reference, logits=logits)


@pytest.mark.parametrize(
    "precision, count, passed",
    [("float32", 0, True), ("float32", 1, False), ("float16", 5, True), ("float16", 6, False)],
)
def test_answers_that_change_are_counted(precision: str, count: int, passed: bool) -> None:
    reference = answers()
    row = compare(changed(reference, count), reference, LIMITS[precision])
    assert row["changed"] == pytest.approx(count / COUNT) and row["passed"] == passed


@pytest.mark.parametrize("side", ["images", "texts"])
def test_one_feature_that_is_off_is_enough(side: str) -> None:
    reference = answers()
    features = getattr(reference, side).clone()
    features[7] = features[8]
    row = compare(replace(reference, **{side: features}), reference, LIMITS["float16"])
    assert row["changed"] == 0 and row["cosine"] < 0.999 and not row["passed"]


def test_no_number_is_not_equal() -> None:
    reference = answers()
    row = compare(replace(reference, images=reference.images * torch.nan), reference, Limits(1.0, -1.0))
    assert not row["passed"]


@pytest.mark.parametrize("count", [1, 3, CHOICES + 5])
def test_choices_are_the_own_caption_and_others(count: int) -> None:
    choices = Pairs([PICTURE] * count, ["a"] * count).choices()
    assert choices.shape == (count, min(count, CHOICES))
    assert choices[:, 0].tolist() == [*range(count)]
    assert all(len({*row}) == len(row) and max(row) < count for row in choices.tolist())


def test_logits_are_those_of_the_service(clip_dir: object, pictures: list[Image.Image]) -> None:
    service = CLIPInferenceService(str(clip_dir), "cpu")
    captions = [f"{number} cats" for number in range(len(pictures))]
    pairs = Pairs(pictures, captions)
    found = ask(service, pairs)
    expected = torch.tensor([row["logits"] for row in service.batch_predict(pictures, captions)])
    torch.testing.assert_close(found.logits, expected.gather(1, pairs.choices()), atol=1e-4, rtol=0)
