"""A judge of drawn scenes that knows only captions: a CLIP, beside `scripts.demo_model.scenes.score_image`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from runners.clip import CLIPInferenceService
from scripts.demo_clip.networks import variants
from scripts.demo_model.scenes import Scene, Score

# What image analysis looks for, and what differs in the captions that have to fit less.
ASPECTS = {"colour": "colour", "shape": "kind", "position": "position"}


def judge(service: CLIPInferenceService, picture: np.ndarray, scene: Scene) -> Score:
    """What of a uint8 picture [height, width, 3] is right: its caption fits better than all that differ in that."""
    others = variants(scene)
    names = [*ASPECTS.values()]
    captions = [scene.caption(), *(other.caption() for name in names for other in others[name])]
    image = service.extract_image_features(Image.fromarray(picture))[0]
    fits = (service.extract_text_features(captions) @ image).tolist()
    right, best = fits.pop(0), {}
    for aspect, name in ASPECTS.items():
        best[aspect] = right > max(fits[: len(others[name])])
        del fits[: len(others[name])]
    return Score(**best)


def agreement(first: Sequence[Score], second: Sequence[Score]) -> dict[str, float]:
    """In how many of the pictures, in percent, two judges say the same of each aspect, and of all together."""
    pairs = list(zip(first, second, strict=True))
    return {
        aspect: 100 * float(np.mean([getattr(a, aspect) == getattr(b, aspect) for a, b in pairs]))
        for aspect in (*ASPECTS, "all")
    }
