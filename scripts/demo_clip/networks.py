"""The network of the demo CLIP, and the examples that it learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scripts.demo_model.networks import TEXT_LENGTH
from scripts.demo_model.scenes import BACKGROUNDS, COLOURS, PAIRS, POSITIONS, RADII, SHAPES, Scene, sample_scene

WIDTH = 128
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
IMAGE_SIZE = 64  # pixels
PATCH_SIZE = 16
PLACE_SCALE = 0.5  # standard deviation of what tells patches' places at first: of transformers' own little is learned
PLACES = [*((place,) for place in POSITIONS), *PAIRS, *(pair[::-1] for pair in PAIRS)]
WORDS = {"size": list(RADII), "colour": list(COLOURS), "kind": list(SHAPES)}  # of a shape, beside its position


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size), tokenizer)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP for texts of that tokenizer, with random weights."""
    text = {
        **TOWER,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**TOWER, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=PLACE_SCALE)
    return model


def variants(scene: Scene) -> dict[str, list[Scene]]:
    """All scenes that differ from `scene` in one word, or in where its shapes are, by what differs."""
    found: dict[str, list[Scene]] = {
        "background": [replace(scene, background=name) for name in BACKGROUNDS],
        "position": [_placed(scene, places) for places in PLACES if len(places) == len(scene.shapes)],
    }
    for name, words in WORDS.items():
        found[name] = [
            replace(scene, shapes=(*scene.shapes[:index], replace(shape, **{name: word}), *scene.shapes[index + 1 :]))
            for index, shape in enumerate(scene.shapes)
            for word in words
        ]
    return {name: [other for other in others if not same(other, scene)] for name, others in found.items()}


def _placed(scene: Scene, places: Sequence[str]) -> Scene:
    shapes = (replace(shape, position=place) for shape, place in zip(scene.shapes, places, strict=True))
    return replace(scene, shapes=tuple(shapes))


def same(first: Scene, second: Scene) -> bool:
    """Whether two scenes show the same, whatever the order of their shapes."""
    return first.background == second.background and set(first.shapes) == set(second.shapes)


def training_scenes(rng: random.Random, count: int) -> list[Scene]:
    """`count` scenes of the training split, no two of which show the same; every second is a variant of another."""
    scenes: dict[tuple[frozenset, str], Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng)
        kind = rng.choice([others for others in variants(scene).values() if others])
        for new in (scene, rng.choice(kind)):
            if new.is_held_out():
                continue
            scenes[frozenset(new.shapes), new.background] = new
    return list(scenes.values())[:count]


def read(processor: CLIPProcessor, captions: Sequence[str], pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """What `CLIPModel` takes for captions and uint8 pictures [height, width, 3]."""
    return dict(processor(text=list(captions), images=list(pictures), padding=True, return_tensors="pt"))
