"""The pictures the demo editor lives in: one to four flat shapes, each in a corner of its own.

    scene = sample_scene(random.Random(0), 2)
    scene.description()              'large red circle top left, small blue square bottom right, grey background'
    scene.render()                   uint8 array [128, 128, 3]

Shapes and colours are those of the demo model for Stable Diffusion, whose VAE knows how to draw them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from scripts.demo_model.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SUPERSAMPLING,
    Shape,
    draw_shape,
)

RADII: dict[str, tuple[float, float]] = {"small": (17, 19), "large": (25, 27)}  # pixels, from and to
JITTER = 2  # pixels a shape may sit away from the middle of its corner
CORNERS: dict[str, tuple[float, float]] = {  # pixels
    "top left": (32, 32),
    "top right": (96, 32),
    "bottom left": (32, 96),
    "bottom right": (96, 96),
}


@dataclass(frozen=True)
class Placed:
    """A shape and how it sits there: what an edit of something else must not change.

    Attributes:
        shape: its words; `position` is one of CORNERS.
        offset: x and y [pixels] from the corner's middle.
        spread: from 0, the smallest radius its size allows, to 1, the largest.
    """

    shape: Shape
    offset: tuple[float, float] = (0.0, 0.0)
    spread: float = 0.5

    @property
    def centre(self) -> tuple[float, float]:
        x, y = CORNERS[self.shape.position]
        return x + self.offset[0], y + self.offset[1]

    @property
    def radius(self) -> float:
        low, high = RADII[self.shape.size]
        return low + self.spread * (high - low)

    def but(self, **words: str) -> Placed:
        """The same with other words."""
        return replace(self, shape=replace(self.shape, **words))


@dataclass(frozen=True)
class Scene:
    """Shapes in different corners of a plain background."""

    shapes: tuple[Placed, ...]
    background: str

    @property
    def words(self) -> str:
        """What the scene shows, whatever the order and the exact places of its shapes."""
        return f"{sorted(repr(placed.shape) for placed in self.shapes)} {self.background}"

    def free_corners(self) -> list[str]:
        taken = {placed.shape.position for placed in self.shapes}
        return [corner for corner in CORNERS if corner not in taken]

    def without(self, placed: Placed) -> Scene:
        return replace(self, shapes=tuple(other for other in self.shapes if other != placed))

    def having(self, placed: Placed) -> Scene:
        return replace(self, shapes=(*self.shapes, placed))

    def description(self, rng: random.Random | None = None) -> str:
        """The scene in words, which refining follows; `rng` chooses the order of the shapes."""
        shapes = [placed.shape for placed in self.shapes]
        if rng is not None:
            rng.shuffle(shapes)
        phrases = [f"{s.size} {s.colour} {s.kind} {s.position}" for s in shapes]
        return ", ".join([*phrases, f"{self.background} background"])

    def render(self) -> np.ndarray:
        """The scene as uint8 [128, 128, 3]."""
        canvas = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, BACKGROUNDS[self.background])
        draw = ImageDraw.Draw(canvas)
        for placed in self.shapes:
            draw_shape(draw, placed.shape, *placed.centre, placed.radius)
        return np.asarray(canvas.reduce(SUPERSAMPLING))


def sample_placed(rng: random.Random, corner: str) -> Placed:
    """A random shape there, moved and scaled a little within its words' meaning."""
    shape = Shape(rng.choice(list(RADII)), rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), corner)
    return Placed(shape, (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)), rng.random())


def sample_scene(rng: random.Random, count: int) -> Scene:
    """`count` random shapes, 1 to 4, on a random background. The VAE makes nothing of a picture without a shape."""
    corners = rng.sample(list(CORNERS), count)
    return Scene(tuple(sample_placed(rng, corner) for corner in corners), rng.choice(list(BACKGROUNDS)))
