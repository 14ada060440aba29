"""Pictures and texts as what the towers take."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from runners.images import read_picture, upright

Picture = str | Path | Image.Image
TOKENIZING = threading.Lock()  # a fast tokenizer keeps as its state whether it pads and truncates; each call sets that
WIDEST = 16  # times the shorter side; beyond it the middle is cut out before the shorter side is brought to size


def open_rgb(picture: Picture) -> Image.Image:
    """`picture`, or what is in the file of that name, the right way up and on white where it is transparent.

    Raises:
        UserError: the file holds no picture that can be read, or has values of 32 bits.
    """
    if isinstance(picture, Image.Image):
        image = upright("a picture", picture)
    else:
        image = read_picture("picture", Path(picture))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prepare_pictures(processor: Any, pictures: Sequence[Picture], as_bytes: bool = False) -> Tensor:
    """Pixel values [count, 3, height, width]: float32 as the model was trained, or `as_bytes` uint8 as they are."""
    image_processor = processor.image_processor
    images = [open_rgb(picture) for picture in pictures]
    if image_processor.size.get("shortest_edge"):  # the rest is cut off, but only after it was scaled
        images = [_middle(image) for image in images]
    options = {"do_rescale": False, "do_normalize": False} if as_bytes else {}
    values = image_processor(images, return_tensors="pt", **options).pixel_values
    return values.to(torch.uint8 if as_bytes else torch.float32)


def _middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = WIDEST * min(width, height)
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


@dataclass(frozen=True)
class Tokens:
    """
    Attributes:
        input_ids: int64 [count, length].
        truncated: those of the texts that were too long, and lost their end.
    """

    input_ids: Tensor
    truncated: list[str]


def prepare_texts(processor: Any, texts: Sequence[str], length: int, pad_to_length: bool) -> Tokens:
    """Token ids of at most `length`, padded to that or to the longest of `texts`. Threads may share `processor`."""
    tokenizer = processor.tokenizer
    with TOKENIZING:
        whole = tokenizer(list(texts)).input_ids
        cut = tokenizer(
            list(texts),
            padding="max_length" if pad_to_length else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
    truncated = [text for text, tokens in zip(texts, whole, strict=True) if len(tokens) > length]
    return Tokens(cut.input_ids, truncated)
