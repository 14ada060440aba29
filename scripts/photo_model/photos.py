"""The photographs the photo model learns from: those in scikit-image's own package whose notes let anyone use them.

    picture = crop(load_photo("coffee"), random.Random(0))         uint8 array [128, 128, 3]
    CAPTIONS["coffee"][0]                                          'a photo of a cup of coffee'

Who took them, and their licences, is in the docstrings of the functions of `skimage.data` that `PHOTOS` names: brick,
camera, cell, chelsea, coffee, grass, gravel and retina say CC0; astronaut, clock, hubble_deep_field and rocket, public
domain; coins and immunohistochemistry, no known copyright restrictions. They come with the wheel that requirements.txt
pins, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import skimage.data
from PIL import Image, ImageOps

from scripts.demo_model.scenes import IMAGE_SIZE

PHOTOS = {  # by the name of a function of skimage.data, what there is to see
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a cameraman",
    "cell": "a cell",
    "chelsea": "a cat",
    "clock": "a clock",
    "coffee": "a cup of coffee",
    "coins": "old coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies",
    "immunohistochemistry": "stained tissue",
    "retina": "a retina",
    "rocket": "a rocket",
}
WORDINGS = ("a photo of {}", "a picture of {}", "{}")
CAPTIONS = {name: tuple(wording.format(words) for wording in WORDINGS) for name, words in PHOTOS.items()}
MIN_SHARE = 0.5  # of a photograph's shorter side that is in a picture


@functools.cache
def load_photo(name: str) -> Image.Image:
    """A photograph of `PHOTOS`, in colour mode even where it is grey."""
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def crop(photo: Image.Image, rng: random.Random, size: int = IMAGE_SIZE) -> np.ndarray:
    """A random square of a photograph, half the time mirrored, uint8 [size, size, 3].

    A smaller `size` shows less of the photograph, at the scale that a picture of `IMAGE_SIZE` has.
    """
    side = round(min(photo.size) * rng.uniform(MIN_SHARE, 1) * size / IMAGE_SIZE)
    left, top = (rng.randint(0, length - side) for length in photo.size)
    box = (left, top, left + side, top + side)
    picture = photo.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(ImageOps.mirror(picture) if rng.random() < 0.5 else picture)
