"""Requests and answers: embeddings as OpenAI's interface has them, zero-shot classification as the Hugging Face hub's.

https://platform.openai.com/docs/api-reference/embeddings
https://huggingface.co/docs/inference-providers/tasks/zero-shot-image-classification
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
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
from runners.images import open_picture, upright

# Whose headers say how many pixels will be decoded, and that need no program of their own, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
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


@dataclass(frozen=True)
class SentPicture:
    """A picture as it came.

    Attributes:
        name: what errors call it.
        data: of the file.
        pixels: as the file's header says.
    """

    name: str
    data: bytes
    pixels: int

    @classmethod
    def read(cls, name: str, text: str) -> Self:
        """Of base64, as a data URL or bare. Raises Refusal: it is neither, or no picture."""
        data = _data_of(name, text)
        try:
            with open_picture(name, io.BytesIO(data), FORMATS) as image:
                return cls(name, data, image.width * image.height)
        except UserError as error:
            raise Refusal(400, "bad_picture", str(error)) from error

    def decode(self) -> Image.Image:
        """The right way up, in a mode of 8 bits. Raises Refusal: it is damaged, or of 32 bits."""
        try:
            with open_picture(self.name, io.BytesIO(self.data), FORMATS) as image:
                return upright(self.name, image)
        except UserError as error:
            raise Refusal(400, "bad_picture", str(error)) from error


def _data_of(name: str, text: str) -> bytes:
    if text.startswith("data:"):
        _, comma, text = text.partition(",")
        if not comma:
            raise Refusal(400, "bad_picture", f"{name} is a data URL without a comma")
    elif text.startswith(("http://", "https://")):
        raise Refusal(400, "bad_picture", f"{name} is an address: nothing is fetched; send the picture in base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii's is one, and that of other characters than ASCII's
        raise Refusal(400, "bad_picture", f"{name} is no base64: {error}") from error


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

    def content(self, name: str) -> str | SentPicture:
        """Raises Refusal: there is no picture in it."""
        return SentPicture.read(name, self.image) if self.image is not None else str(self.text)


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

    def contents(self) -> list[str | SentPicture]:
        """Raises Refusal: what should be a picture is none."""
        return [each.content(f"input {number}") for number, each in enumerate(self.input)]


class ZeroShotParameters(Strict):
    candidate_labels: Annotated[list[Text], Field(min_length=1)]
    hypothesis_template: Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^{}]*\{\}[^{}]*$")] = "{}"


class ZeroShotRequest(Strict):
    """`inputs` is a picture in base64, as a data URL or bare. Labels take their place in the template's braces."""

    inputs: str
    parameters: ZeroShotParameters
    model: str | None = None

    def contents(self) -> list[str | SentPicture]:
        """The picture, and the text of each label. Raises Refusal: what should be a picture is none."""
        template = self.parameters.hypothesis_template
        texts = [template.replace("{}", label) for label in self.parameters.candidate_labels]
        return [SentPicture.read("inputs", self.inputs), *texts]


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], body: bytes) -> Model:
    """Raises Refusal: `body` is no JSON, or not of that form."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Refusal(400, "bad_request", f"{place}: {first['msg']}" if place else first["msg"]) from error


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
