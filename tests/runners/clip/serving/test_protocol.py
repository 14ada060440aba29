"""What requests may look like, and what answers do."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydantic")

from runners.clip.serving.protocol import (
    EmbeddingsRequest,
    Refusal,
    SentPicture,
    ZeroShotRequest,
    embeddings_answer,
    parse,
    zero_shot_answer,
)


def encoded(image: Image.Image, kind: str = "png") -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


RED = encoded(Image.new("RGB", (4, 3), "red"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ({"text": "a"}, ["a"]), ([{"text": "a"}, "b"], ["a", "b"])],
)
def test_texts_come_alone_or_together_bare_or_named(given: object, expected: list[str]) -> None:
    assert parse(EmbeddingsRequest, json.dumps({"input": given}).encode()).contents() == expected


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_pictures_come_in_base64(prefix: str) -> None:
    (picture,) = parse(EmbeddingsRequest, json.dumps({"input": {"image": prefix + RED}}).encode()).contents()
    assert isinstance(picture, SentPicture) and picture.pixels == 12 and picture.decode().size == (4, 3)
    asked = {"inputs": prefix + RED, "parameters": {"candidate_labels": ["cat"], "hypothesis_template": "a {}"}}
    same, text = parse(ZeroShotRequest, json.dumps(asked).encode()).contents()
    assert isinstance(same, SentPicture) and same.data == picture.data and text == "a cat"


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (EmbeddingsRequest, b"{", "Invalid JSON"),
        (EmbeddingsRequest, b'{"input": []}', "input: List should have at least 1 item"),
        (EmbeddingsRequest, b'{"input": ["a", " "]}', "input.1.text: String should match"),
        (EmbeddingsRequest, b'{"input": "a", "dimensions": 3}', "dimensions: Extra inputs"),
        (EmbeddingsRequest, b'{"input": {}}', "wants either a text or an image"),
        (EmbeddingsRequest, b'{"input": "a", "encoding_format": "hex"}', "encoding_format: Input should be 'float'"),
        (ZeroShotRequest, b'{"inputs": "x"}', "parameters: Field required"),
        (ZeroShotRequest, b'{"inputs": "x", "parameters": {"candidate_labels": []}}', "candidate_labels: List should"),
        (
            ZeroShotRequest,
            b'{"inputs": "x", "parameters": {"candidate_labels": ["a"], "hypothesis_template": "{} {}"}}',
            "hypothesis_template: String should match",
        ),
    ],
)
def test_what_is_wrong_is_named(kind: type, body: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no picture", "input 0 is no base64"),
        ("Ünicode=", "input 0 is no base64"),
        (base64.b64encode(b"no picture").decode(), "input 0 is no picture that can be read"),
        (RED[: len(RED) // 8 * 4], "input 0"),
        ("https://example.org/a.png", "nothing is fetched"),
        ("data:image/png;base64", "a data URL without a comma"),
        (encoded(Image.new("RGB", (4, 3)), "eps"), "input 0 is no picture that can be read"),  # by Ghostscript alone
    ],
)
def test_a_picture_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        SentPicture.read("input 0", text).decode()
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp"])
def test_pixels_are_known_before_they_are_decoded(kind: str) -> None:
    whole = base64.b64decode(encoded(Image.effect_noise((60, 50), 80), kind))
    picture = SentPicture.read("input 0", base64.b64encode(whole).decode())
    assert picture.pixels == 3000 and picture.decode().size == (60, 50)
    start = base64.b64encode(whole[: len(whole) // 2]).decode()
    with pytest.raises(Refusal, match="input 0"):
        SentPicture.read("input 0", start).decode()
    if kind != "webp":  # which Pillow reads whole
        assert SentPicture.read("input 0", start).pixels == 3000


def test_answers_have_the_form_that_clients_know() -> None:
    rows = [np.array([0.6, 0.8], np.float32), np.array([1, 0], np.float32)]
    asked = parse(EmbeddingsRequest, b'{"input": ["a", "b"], "encoding_format": "base64"}')
    answer = embeddings_answer(rows, asked, "clip", [1])
    assert answer["object"] == "list" and answer["model"] == "clip" and answer["truncated_inputs"] == [1]
    assert [each["index"] for each in answer["data"]] == [0, 1]
    assert np.array_equal(np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4"), rows[0])
    assert zero_shot_answer(["a", "b"], [0.25, 0.75]) == [
        {"label": "b", "score": 0.75},
        {"label": "a", "score": 0.25},
    ]
