"""The network of the demo CLIP, and the examples that it learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scripts.demo_model.scenes import BACKGROUNDS, COLOURS, PAIRS, POSITIONS, RADII, SHAPES, Scene, sample_scene

WIDTH = 128
IMAGE_SIZE = 64  # pixels
PATCH_SIZE = 8
WORDS = {"size": list(RADII), "colour": list(COLOURS), "kind": list(SHAPES)}  # of a shape, beside its position


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size), tokenizer)


def build_clip(text_encoder: Path) -> CLIPModel:
    """A CLIP whose text tower starts as the demo model's text encoder, in its folder, and the rest at random."""
    text_model = CLIPTextModel.from_pretrained(text_encoder, dtype=torch.float32)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
    }
    text = text_model.config.to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    model.text_model.load_state_dict(text_model.state_dict())
    return model


def variants(scene: Scene) -> list[Scene]:
    """All scenes that differ from `scene` in one word: the captions that are easiest taken for its own."""
    found = [replace(scene, background=name) for name in BACKGROUNDS if name != scene.background]
    for index, shape in enumerate(scene.shapes):
        others = [replace(shape, **{name: word}) for name, words in WORDS.items() for word in words]
        if len(scene.shapes) == 1:
            others += [replace(shape, position=position) for position in POSITIONS]
        changed = [[*scene.shapes[:index], other, *scene.shapes[index + 1 :]] for other in others if other != shape]
        found += [replace(scene, shapes=tuple(shapes)) for shapes in changed]
    if len(scene.shapes) == 2:  # the two pairs of places, and the same shapes the other way round
        for pair in PAIRS:
            for places in (pair, pair[::-1]):
                shapes = tuple(replace(s, position=p) for s, p in zip(scene.shapes, places, strict=True))
                found.append(replace(scene, shapes=shapes))
    return [other for other in found if not same(other, scene)]


def same(first: Scene, second: Scene) -> bool:
    """Whether two scenes show the same, whatever the order of their shapes."""
    return first.background == second.background and set(first.shapes) == set(second.shapes)


def training_scenes(rng: random.Random, count: int) -> list[Scene]:
    """`count` scenes of the training split, no two of which show the same; every second is a variant of another."""
    scenes: dict[tuple[frozenset, str], Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng)
        variant = rng.choice([other for other in variants(scene) if not other.is_held_out()])
        for new in (scene, variant):
            scenes[frozenset(new.shapes), new.background] = new
    return list(scenes.values())[:count]


def read(processor: CLIPProcessor, captions: Sequence[str], pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """What `CLIPModel` takes for captions and uint8 pictures [height, width, 3]."""
    return dict(processor(text=list(captions), images=list(pictures), padding=True, return_tensors="pt"))
