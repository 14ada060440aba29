"""The world the demo model lives in: captioned scenes of one or two flat shapes, and a judge for pictures of them.

    scene = sample_scene(random.Random(0))
    scene.caption()                  'a small red circle on the left and a large blue cross on the right'
    scene.render()                   uint8 array [128, 128, 3]
    score_image(image, scene)        Score(colour=True, shape=True, position=False)

A fifth of all scenes is held out for evaluation: `sample_scene(rng, held_out=True)` never returns a scene that
`sample_scene(rng)` can, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from skimage.color import rgb2lab
from skimage.draw import polygon2mask
from skimage.measure import centroid, label, regionprops

IMAGE_SIZE = 128  # pixels
SUPERSAMPLING = 4

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (250, 215, 40),
    "purple": (150, 50, 180),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (140, 140, 140), "black": (15, 15, 15)}
RADII: dict[str, tuple[float, float]] = {"small": (16, 18), "large": (25, 28)}  # pixels, from and to
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (32, 64),
    "right": (96, 64),
    "top": (64, 32),
    "bottom": (64, 96),
    "centre": (64, 64),
}
PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
PAIRS = (("left", "right"), ("top", "bottom"))
JITTER = 3  # pixels a shape may sit away from the point its position names
CAPTIONS = ("{objects}, {background} background", "{objects} on a {background} background")

_CROSS_ARM = 0.38  # half the width of an arm, as a share of half its length
SHAPES: dict[str, Sequence[tuple[float, float]]] = {  # outlines (x right, y down) that touch the box [-1, 1] x [-1, 1]
    "circle": [(float(np.cos(a)), float(np.sin(a))) for a in np.linspace(0, 2 * np.pi, 64, endpoint=False)],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "cross": [
        (-_CROSS_ARM, -1), (_CROSS_ARM, -1), (_CROSS_ARM, -_CROSS_ARM), (1, -_CROSS_ARM),
        (1, _CROSS_ARM), (_CROSS_ARM, _CROSS_ARM), (_CROSS_ARM, 1), (-_CROSS_ARM, 1),
        (-_CROSS_ARM, _CROSS_ARM), (-1, _CROSS_ARM), (-1, -_CROSS_ARM), (-_CROSS_ARM, -_CROSS_ARM),
    ],
}  # fmt: skip

NEW_SHAPES: dict[str, Sequence[tuple[float, float]]] = {  # which the demo model never saw: see scripts/demo_lora
    "star": [
        (0.0, -1.0), (0.309, -0.342), (1.0, -0.236), (0.5, 0.276), (0.618, 1.0),
        (0.0, 0.658), (-0.618, 1.0), (-0.5, 0.276), (-1.0, -0.236), (-0.309, -0.342),
    ],
}  # fmt: skip
_OUTLINES = {**SHAPES, **NEW_SHAPES}

HELD_OUT_ONE_IN = 5
MAX_HELD_OUT = 2000  # a little less than there are, so that drawing different ones at random stays quick

# The judge's tolerances, set so that it passes renderings of every scene and rejects shapes a person would not name.
_FOREGROUND_DISTANCE = 20.0  # CIELAB distance from the background at which a pixel belongs to an object
_MIN_AREA = 100  # pixels; what is smaller is a speck, not an object (the smallest real one has about 500)
_MIN_OVERLAP = 0.78  # intersection over union of a region with the ideal outline of its area and place
_MAX_COLOUR_DISTANCE = 30.0  # CIELAB distance from the named colour at which it stops being that colour


@dataclass(frozen=True)
class Shape:
    """One object. Every field is a key of the table of that name above."""

    size: str
    colour: str
    kind: str
    position: str

    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.kind} {PHRASES[self.position]}"


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a plain background."""

    shapes: tuple[Shape, ...]
    background: str

    def caption(self, rng: random.Random | None = None) -> str:
        """The scene in words; `rng` chooses among the templates and the order of the objects."""
        shapes, template = list(self.shapes), CAPTIONS[0]
        if rng is not None:
            rng.shuffle(shapes)
            template = rng.choice(CAPTIONS)
        return template.format(objects=" and ".join(s.phrase() for s in shapes), background=self.background)

    def render(self, rng: random.Random | None = None) -> np.ndarray:
        """The scene as uint8 [128, 128, 3]; `rng` moves and scales each shape a little within its words' meaning."""
        canvas = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, BACKGROUNDS[self.background])
        draw = ImageDraw.Draw(canvas)
        for shape in self.shapes:
            (x, y), (low, high) = POSITIONS[shape.position], RADII[shape.size]
            radius = (low + high) / 2
            if rng is not None:
                x, y = x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER)
                radius = rng.uniform(low, high)
            draw_shape(draw, shape, x, y, radius)
        return np.asarray(canvas.reduce(SUPERSAMPLING))

    def is_held_out(self) -> bool:
        """Whether the scene belongs to evaluation. Depends on what it shows alone, not on wording or order."""
        digest = hashlib.sha256(f"{sorted(map(repr, self.shapes))} {self.background}".encode()).digest()
        return digest[0] % HELD_OUT_ONE_IN == 0


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, x: float, y: float, radius: float) -> None:
    """Draw a shape around x, y [pixels] on a canvas that has SUPERSAMPLING times as many to a side."""
    outline = [((x + u * radius) * SUPERSAMPLING, (y + v * radius) * SUPERSAMPLING) for u, v in _OUTLINES[shape.kind]]
    draw.polygon(outline, fill=COLOURS[shape.colour])


@dataclass(frozen=True)
class Score:
    """What of a picture is right. A picture with the wrong number of objects is wrong in all three."""

    colour: bool
    shape: bool
    position: bool

    @property
    def all(self) -> bool:
        return self.colour and self.shape and self.position


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of the training split, or of the held-out one; one or two objects with equal chance."""
    while True:
        positions: tuple[str, ...] = (rng.choice(list(POSITIONS)),) if rng.random() < 0.5 else rng.choice(PAIRS)
        shapes = tuple(
            Shape(rng.choice(list(RADII)), rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), position)
            for position in positions
        )
        scene = Scene(shapes, rng.choice(list(BACKGROUNDS)))
        if scene.is_held_out() == held_out:
            return scene


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different scenes of the held-out split.

    Raises:
        ValueError: the split has fewer.
    """
    if count > MAX_HELD_OUT:
        raise ValueError(f"there are {MAX_HELD_OUT} held-out scenes, not {count}")
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}  # a set that remembers its order
    while len(scenes) < count:
        scenes[sample_scene(rng, held_out=True)] = None
    return list(scenes)


def score_image(image: np.ndarray, scene: Scene, kinds: Collection[str] = tuple(SHAPES)) -> Score:
    """Judge a picture by image analysis alone.

    Args:
        image: uint8 [height, width, 3], RGB; any size, positions are read as shares of it.
        scene: what the picture should show.
        kinds: the shapes that an object may be.
    """
    found = find_shapes(image, kinds)
    if len(found) != len(scene.shapes):
        return Score(False, False, False)

    def compare(order: Sequence[FoundShape]) -> Score:
        pairs = list(zip(order, scene.shapes, strict=True))
        return Score(
            colour=all(f.colour == s.colour for f, s in pairs),
            shape=all(f.kind == s.kind for f, s in pairs),
            position=all(f.position == s.position for f, s in pairs),
        )

    # Which found object stands for which wanted one is the reading that is kindest to the picture.
    scores = [compare(order) for order in itertools.permutations(found)]
    return max(scores, key=lambda s: (s.all, s.colour + s.shape + s.position))


@dataclass(frozen=True)
class FoundShape:
    """A region of a picture in the scenes' words; None where no word fits.

    Attributes:
        centre: x and y of the middle of its bounding box, as shares of the picture's width and height.
        area: as a share of the picture's.
    """

    colour: str | None
    kind: str | None
    position: str
    centre: tuple[float, float]
    area: float


def find_shapes(image: np.ndarray, kinds: Collection[str] = tuple(SHAPES)) -> list[FoundShape]:
    """The objects in a uint8 [height, width, 3] RGB picture: what differs from the colour of its border."""
    lab = rgb2lab(image)
    border = np.concatenate([lab[:3].reshape(-1, 3), lab[-3:].reshape(-1, 3), lab[:, :3].reshape(-1, 3)])
    distance = np.linalg.norm(lab - np.median(border, axis=0), axis=-1)
    min_area = _MIN_AREA * distance.size / IMAGE_SIZE**2
    regions = [r for r in regionprops(label(distance > _FOREGROUND_DISTANCE), distance) if r.area >= min_area]
    found = []
    for region in regions:
        # An edge, sharp or soft, is where the picture is half way from the background to the object.
        mask = region.image & (region.image_intensity > np.median(distance[tuple(region.coords.T)]) / 2)
        centre = _middle(region.bbox, distance.shape)
        colour = _name_colour(np.median(lab[tuple(region.coords.T)], axis=0))
        area = float(mask.sum()) / distance.size
        found.append(FoundShape(colour, _name_shape(mask, kinds), _name_position(centre), centre, area))
    return found


def _name_colour(lab: np.ndarray) -> str | None:
    names = list(COLOURS)
    palette = rgb2lab(np.array([COLOURS[name] for name in names], dtype=np.uint8)[None])[0]
    distances = np.linalg.norm(palette - lab, axis=-1)
    return names[distances.argmin()] if distances.min() <= _MAX_COLOUR_DISTANCE else None


def _name_shape(mask: np.ndarray, kinds: Collection[str]) -> str | None:
    """The kind whose outline covers the mask best, of the same area and centroid: a blunt corner moves neither."""
    overlaps = {kind: _overlap(mask, kind) for kind in kinds}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _MIN_OVERLAP else None


def _overlap(mask: np.ndarray, kind: str) -> float:
    """Intersection over union of a bool mask [height, width] with the outline of `kind` laid over it."""
    mask = np.pad(mask, max(mask.shape) // 2)  # room for corners that the mask lacks
    (row, column), area = centroid(mask), mask.sum()
    x, y, outline_area = polygon_moments(np.array(_OUTLINES[kind]))
    scale = (area / outline_area) ** 0.5
    ideal = polygon2mask(mask.shape, [(row + (v - y) * scale, column + (u - x) * scale) for u, v in _OUTLINES[kind]])
    return float((mask & ideal).sum() / (mask | ideal).sum())


def polygon_moments(outline: np.ndarray) -> tuple[float, float, float]:
    """Centroid x and y, and the area, of a polygon [corners, 2] (the shoelace formula)."""
    following = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * following[:, 1] - following[:, 0] * outline[:, 1]
    x, y = ((outline + following) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
    return float(x), float(y), float(abs(cross.sum()) / 2)


def _middle(bbox: tuple[int, int, int, int], shape: tuple[int, ...]) -> tuple[float, float]:
    """x and y of the middle of a bounding box, as shares of a picture of that shape."""
    return (bbox[1] + bbox[3]) / 2 / shape[1], (bbox[0] + bbox[2]) / 2 / shape[0]


def _name_position(centre: tuple[float, float]) -> str:
    """The named point nearest to x and y, shares of a picture."""
    x, y = centre
    return min(
        POSITIONS, key=lambda p: (POSITIONS[p][0] / IMAGE_SIZE - x) ** 2 + (POSITIONS[p][1] / IMAGE_SIZE - y) ** 2
    )
