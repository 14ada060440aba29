"""Requests and answers: embeddings as OpenAI's interface has them, zero-shot classification as the Hugging Face hub's.

https://platform.openai.com/docs/api-reference/embeddings
https://huggingface.co/docs/inference-providers/tasks/zero-shot-image-classification
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from runners.cli import UserError
from runners.images import decode_picture

TOO_MANY_REQUESTS = 429


class Refusal(Exception):
    """An answer that is an error, with its HTTP status and a word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        is_theirs = 400 <= self.status < 500 and self.status != TOO_MANY_REQUESTS
        kind = "invalid_request_error" if is_theirs else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.code}}


class Strict(BaseModel):
    """A field that nobody reads is an error, and not left out."""

    model_config = ConfigDict(extra="forbid")


Text = Annotated[str, StringConstraints(min_length=1, max_length=10_000, pattern=r"\S")]


class Input(Strict):
    """A text, or a picture in base64, as a data URL or bare."""

    text: Text | None = None
    image: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"text": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("wants either a text or an image")
        return self

    def content(self, name: str) -> str | Image.Image:
        """Raises Refusal: the picture cannot be read."""
        return decode(self.image, name) if self.image is not None else str(self.text)


class EmbeddingsRequest(Strict):
    """`input` is a text, an object with a `text` or an `image`, or several of these."""

    input: Annotated[list[Input], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # which OpenAI's clients may send; nothing depends on it

    @field_validator("input", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return given if isinstance(given, list) else [given]

    def contents(self) -> Sequence[str | Image.Image]:
        """Raises Refusal: a picture cannot be read."""
        return [each.content(f"input {number}") for number, each in enumerate(self.input)]


class ZeroShotParameters(Strict):
    candidate_labels: Annotated[list[Text], Field(min_length=1)]
    hypothesis_template: Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^{}]*\{\}[^{}]*$")] = "{}"


class ZeroShotRequest(Strict):
    """`inputs` is a picture in base64, as a data URL or bare. Labels take their place in the template's braces."""

    inputs: str
    parameters: ZeroShotParameters
    model: str | None = None

    def picture(self) -> Image.Image:
        """Raises Refusal: it cannot be read."""
        return decode(self.inputs, "inputs")

    def texts(self) -> list[str]:
        return [self.parameters.hypothesis_template.replace("{}", label) for label in self.parameters.candidate_labels]


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], body: bytes) -> Model:
    """Raises Refusal: `body` is no JSON, or not of that form."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Refusal(400, "bad_request", f"{place}: {first['msg']}" if place else first["msg"]) from error


def decode(text: str, name: str) -> Image.Image:
    """The picture in base64, as a data URL or bare. Raises Refusal."""
    if text.startswith("data:"):
        _, comma, text = text.partition(",")
        if not comma:
            raise Refusal(400, "bad_picture", f"{name} is a data URL without a comma")
    elif text.startswith(("http://", "https://")):
        raise Refusal(400, "bad_picture", f"{name} is an address: nothing is fetched; send the picture in base64")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise Refusal(400, "bad_picture", f"{name} is no base64: {error}") from error
    try:
        return decode_picture(name, io.BytesIO(data))
    except UserError as error:
        raise Refusal(400, "bad_picture", str(error)) from error


def embeddings_answer(
    rows: Sequence[np.ndarray], request: EmbeddingsRequest, model: str, truncated: Sequence[int]
) -> dict[str, Any]:
    """Rows are `[width]` float32; in base64 these are their little-endian bytes, as OpenAI's clients expect.

    `truncated_inputs`, which OpenAI has not, says which texts were too long, and lost their end.
    """

    def written(row: np.ndarray) -> Any:
        if request.encoding_format == "base64":
            return base64.b64encode(row.astype("<f4").tobytes()).decode()
        return row.tolist()

    data = [{"object": "embedding", "index": place, "embedding": written(row)} for place, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": model, "truncated_inputs": list(truncated)}


def zero_shot_answer(labels: Sequence[str], shares: Sequence[float]) -> list[dict[str, Any]]:
    """The best label first."""
    pairs = sorted(zip(labels, shares, strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "score": share} for label, share in pairs]
