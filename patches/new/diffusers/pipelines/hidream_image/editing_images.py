# Copyright 2026 The diffusers-npu authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Pictures on their way into HiDream's editing and back: what is an RGB picture of a size that the model takes, and how the
result becomes as large as the picture was.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps


SIDE_MULTIPLE = 16  # 8 of the VAE, 2 of the patches
E1_1_SIDE = 1024  # E1.1 was trained on pictures of about this side's square
E1_FULL_SIDE = 768
MOST_CROPPED = 0.05  # of a side; where the multiple of 16 would cost more, the picture is squeezed instead
SIZE_POLICIES = ("e1.1", "e1-full")


@dataclass
class FittedImage:
    """
    A picture as the model takes it.

    Attributes:
        image: in RGB, sides multiples of 16.
        original_size: width and height of the picture that came.
        scaled_size: width and height that it was scaled to, of which `image` is the middle.
    """

    image: PIL.Image.Image
    original_size: tuple[int, int]
    scaled_size: tuple[int, int]

    def restore(self, edited: PIL.Image.Image) -> PIL.Image.Image:
        """`edited`, of the size of `image`, as large as the picture that came. What was cropped is mirrored anew."""
        width, height = self.scaled_size
        left, top = (width - edited.width) // 2, (height - edited.height) // 2
        margins = ((top, height - edited.height - top), (left, width - edited.width - left), (0, 0))
        whole = PIL.Image.fromarray(np.pad(np.asarray(edited), margins, mode="symmetric"))
        return whole.resize(self.original_size, PIL.Image.Resampling.BICUBIC)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Of any mode, upright as its Exif data say, transparent parts on white, 16 bits a channel scaled to 8.

    Modes "I" and "F" do not say their range: it is 0 to 255 if no value is larger, and 0 to 1 for such of "F".
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        largest = values.max(initial=0)
        if image.mode == "F":
            most = 1 if largest <= 1 else 255
        else:
            most = 65535 if largest > 255 or image.mode != "I" else 255
        image = PIL.Image.fromarray((values.clip(0, most) * (255 / most)).round().astype(np.uint8))
    if image.mode in ("La", "RGBa"):  # whose colours are multiplied by the alpha already
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "transparency" in image.info or "A" in image.getbands():
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(ground, image)
    return image.convert("RGB")


def fit_image(image: PIL.Image.Image, policy: str, enlarge: bool = False) -> FittedImage:
    """
    Bring a picture to the size that a model was trained for.

    Args:
        image: of any mode and size.
        policy: "e1.1" keeps the aspect, scales to at most 1024 x 1024 pixels and crops the sides to multiples of 16, as
            HiDream-E1's `inference_e1_1.py` does; "e1-full" squeezes to 768 x 768, as its `inference.py` does.
        enlarge: with "e1.1", whether a picture of fewer pixels is scaled up, as the original does.

    Raises:
        ValueError: there is no such policy, or the picture is too narrow: a side would have less than 16 pixels.
    """
    if policy not in SIZE_POLICIES:
        raise ValueError(f"`size_policy` must be one of {', '.join(SIZE_POLICIES)} or None, not {policy!r}")
    original_size = image.size
    image = to_rgb(image)
    upright_size = image.size
    if policy == "e1-full":
        if enlarge:
            raise ValueError("`enlarge` has no effect with `size_policy='e1-full'`: all pictures become 768 x 768")
        size = (E1_FULL_SIDE, E1_FULL_SIDE)
        return FittedImage(image.resize(size, PIL.Image.Resampling.BICUBIC), upright_size, size)
    while min(image.size) >= 2 * E1_1_SIDE:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    size = _e1_1_size(image.width, image.height, enlarge)
    if not all(size):
        raise ValueError(
            f"a picture of {original_size[0]} x {original_size[1]} pixels is too narrow: scaled to the size that "
            f"HiDream-E1.1 takes, a side has less than {SIDE_MULTIPLE} pixels; cut it into pieces"
        )
    factor = max(size[0] / image.width, size[1] / image.height)
    scaled = (round(image.width * factor), round(image.height * factor))
    if any(cut * (1 - MOST_CROPPED) > kept for cut, kept in zip(scaled, size)):
        scaled = size
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    image = image.resize(scaled, PIL.Image.Resampling.BICUBIC).crop((left, top, left + size[0], top + size[1]))
    return FittedImage(image, upright_size, scaled)


def _e1_1_size(width: int, height: int, enlarge: bool) -> tuple[int, int]:
    """The largest multiples of 16 of about this aspect that are no more than 1024 x 1024 pixels."""
    most = E1_1_SIDE * E1_1_SIDE if enlarge else min(E1_1_SIDE * E1_1_SIDE, width * height)
    scale = math.sqrt(most / (width * height))
    # The original rounds each side up or down, and takes what comes closest from below.
    sides = [{_multiple(round(side * scale)), _multiple(math.floor(side * scale))} for side in (width, height)]
    sizes = [(w, h) for w in sides[0] for h in sides[1] if w * h <= most]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _multiple(side: int) -> int:
    return side // SIDE_MULTIPLE * SIDE_MULTIPLE


def fit_images(images: Any, policy: str | None, enlarge: bool) -> tuple[Any, list[FittedImage] | None]:
    """
    What the pipeline's image processor takes, and how to restore it where a policy was applied.

    Args:
        images: a picture, a list of pictures, or what the image processor takes beside: those are left as they are.

    Raises:
        ValueError: pictures of a call come to several sizes, or a policy is asked for what is no picture.
    """
    pictures = images if isinstance(images, (list, tuple)) else [images]
    if not all(isinstance(picture, PIL.Image.Image) for picture in pictures):
        if policy is not None:
            raise ValueError(
                "`size_policy` is for PIL pictures: give tensors and arrays the size that they are to have"
            )
        return images, None
    if not pictures:
        raise ValueError("`image` is an empty list: give at least one picture")
    if policy is None:
        fitted, ready = None, [to_rgb(picture) for picture in pictures]
    else:
        fitted = [fit_image(picture, policy, enlarge) for picture in pictures]
        ready = [each.image for each in fitted]
    sizes = {picture.size for picture in ready}
    if len(sizes) > 1:
        names = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(
            f"the pictures of one call must come to one size, not {names}: edit the others in a call of their own"
        )
    return ready, fitted
