"""Whether a CLIP that is computed in another way still gives the answers of torch's float32 on the CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.clip.inputs import Picture
from runners.clip.service import CLIPInferenceService

CHOICES = 64  # captions among which a picture's best is looked for
BATCH = 64


@dataclass(frozen=True)
class Limits:
    """What may differ.

    Attributes:
        changed: share of the pictures whose best caption is another one.
        cosine: least of a picture's or a text's features with the reference's.
    """

    changed: float
    cosine: float


LIMITS = {"float32": Limits(changed=0.0, cosine=0.9999), "float16": Limits(changed=0.005, cosine=0.999)}


@dataclass(frozen=True)
class Pairs:
    """Pictures, and a caption of each."""

    pictures: Sequence[Picture]
    captions: Sequence[str]

    def choices(self) -> Tensor:
        """int64 [count, choices]: captions for each picture, its own first and the others drawn at random."""
        count, rng = len(self.captions), random.Random(0)
        wanted = min(CHOICES, count) - 1
        return torch.tensor([[own, *_others(rng, count, own, wanted)] for own in range(count)])


def _others(rng: random.Random, count: int, own: int, wanted: int) -> list[int]:
    return [number + (number >= own) for number in rng.sample(range(count - 1), wanted)]


@dataclass(frozen=True)
class Answers:
    """What a service says about pairs, on the CPU in float32.

    Attributes:
        images, texts: normalised features, [count, width].
        logits: [count, choices].
    """

    images: Tensor
    texts: Tensor
    logits: Tensor


def ask(service: CLIPInferenceService, pairs: Pairs) -> Answers:
    starts = range(0, len(pairs.captions), BATCH)
    images = torch.cat([service.extract_image_features(pairs.pictures[i : i + BATCH]).cpu() for i in starts])
    texts = torch.cat([service.extract_text_features(pairs.captions[i : i + BATCH]).cpu() for i in starts])
    return Answers(images, texts, service.scoring.logits(images, texts).gather(1, pairs.choices()))


def compare(found: Answers, reference: Answers, limits: Limits) -> dict[str, Any]:
    """How far `found` is from `reference`.

    Returns:
        `right`, the share of pictures whose own caption is the best; `changed`, of those with another best one than
        the reference's; the least `cosine` of features; `max_logit_error`; `passed`, whether all is within `limits`,
        which `limits` repeats.
    """
    best, expected = found.logits.argmax(dim=1), reference.logits.argmax(dim=1)
    pairs = ((found.images, reference.images), (found.texts, reference.texts))
    changed = (best != expected).float().mean().item()
    cosine = min((a * b).sum(dim=1).min().item() for a, b in pairs)
    return {
        "right": (best == 0).float().mean().item(),
        "changed": changed,
        "cosine": cosine,
        "max_logit_error": (found.logits - reference.logits).abs().max().item(),
        "limits": vars(limits),
        "passed": changed <= limits.changed and cosine >= limits.cosine,  # a NaN passes neither
    }
