"""Edits of scenes: what they ask for, in many wordings, what the result has to be, and a judge for edited pictures.

    edit = sample_edit(random.Random(0))
    edit.source.render(), edit.target.render()
    edit.instruction()                            'make the red circle blue'
    score_edit(picture, edit)                     EditScore(object=True, colour=True, place=True, rest=False)

A tenth of all combinations of a scene and an edit is held out for evaluation: `sample_edit(rng, held_out=True)` never
returns one that training sees (see `pairs_among`), whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.demo_hidream.scenes import CORNERS, RADII, Placed, Scene, sample_placed, sample_scene
from scripts.demo_model.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    FoundShape,
    find_shapes,
    polygon_moments,
)

KINDS = ("recolour", "resize", "move", "remove", "add")
SHAPES_BEFORE = {"recolour": (1, 4), "resize": (1, 4), "move": (1, 3), "remove": (2, 4), "add": (1, 3)}
HELD_OUT_ONE_IN = 10
WORDINGS: dict[str, Sequence[str]] = {
    "recolour": (
        "make {it} {colour}",
        "turn {it} {colour}",
        "paint {it} {colour}",
        "change the colour of {it} to {colour}",
    ),
    "larger": ("make {it} larger", "make {it} bigger", "enlarge {it}"),
    "smaller": ("make {it} smaller", "shrink {it}"),
    "move": ("move {it} to the {corner}", "put {it} in the {corner} corner", "move {it} to the {corner} corner"),
    "remove": ("remove {it}", "delete {it}", "take {it} away"),
    "add": (
        "add a {size} {colour} {shape} in the {corner}",
        "add a {size} {colour} {shape} in the {corner} corner",
        "put a {size} {colour} {shape} in the {corner} corner",
        "draw a {size} {colour} {shape} at the {corner}",
    ),
}

# The judge's tolerances: a model's VAE moves edges by a pixel or two, and a person does not see it.
_MAX_SHIFT = 5.0  # pixels of 128 that the middle of an untouched shape may be off
_MAX_RADIUS_CHANGE = 3.0  # pixels of 128 that the radius of an untouched shape may be off
_MAX_BACKGROUND_CHANGE = 12.0  # of 255, in the median of the border


@dataclass(frozen=True)
class Edit:
    """A change of one shape: `before` is None where it is added, `after` where it is removed."""

    kind: str
    source: Scene
    before: Placed | None
    after: Placed | None

    @property
    def target(self) -> Scene:
        rest = self.source if self.before is None else self.source.without(self.before)
        return rest if self.after is None else rest.having(self.after)

    def is_held_out(self) -> bool:
        """Whether it belongs to evaluation. Depends on what the scenes show alone, not on wording or exact places."""
        digest = hashlib.sha256(f"{self.source.words} {self.target.words}".encode()).digest()
        return digest[0] * 256 + digest[1] < 65536 // HELD_OUT_ONE_IN

    def instruction(self, rng: random.Random | None = None) -> str:
        """What to do; `rng` chooses among the wordings and the ways to name the shape."""
        choose = (lambda options: options[0]) if rng is None else rng.choice
        if self.before is None:
            assert self.after is not None
            shape = self.after.shape
            words = {"size": shape.size, "colour": shape.colour, "shape": shape.kind, "corner": shape.position}
            return str(choose(WORDINGS["add"])).format(**words)
        words = {"it": choose(self.names())}
        wordings = WORDINGS.get(self.kind, ())
        if self.after is not None:
            shape = self.after.shape
            words |= {"colour": shape.colour, "corner": shape.position}
            wordings = wordings or WORDINGS["larger" if shape.size == "large" else "smaller"]
        return str(choose(wordings)).format(**words)

    def names(self) -> list[str]:
        """All that can be said for the shape that changes and means no other, the shortest first."""
        assert self.before is not None
        shape, others = self.before.shape, [p.shape for p in self.source.shapes if p != self.before]
        names = [] if others else ["it"]
        if all(other.kind != shape.kind for other in others):
            names.append(f"the {shape.kind}")
        if all((other.kind, other.colour) != (shape.kind, shape.colour) for other in others):
            names.append(f"the {shape.colour} {shape.kind}")
        if all(other.colour != shape.colour for other in others):
            names.append(f"the {shape.colour} shape")
        return [*names, f"the {shape.kind} in the {shape.position}"]


def edit_between(source: Scene, target: Scene) -> Edit | None:
    """The edit that makes `target` of `source`; None where it would take several, or where no instruction says it."""
    gone = [placed for placed in source.shapes if placed not in target.shapes]
    new = [placed for placed in target.shapes if placed not in source.shapes]
    if source.background != target.background or len(gone) > 1 or len(new) > 1 or not gone + new:
        return None
    if not new:
        return Edit("remove", source, gone[0], None)
    if not gone:  # an instruction to add says nothing of places within a corner, so the shape has to be in its middle
        return Edit("add", source, None, new[0]) if new[0] == Placed(new[0].shape) else None
    changes = {"recolour": "colour", "resize": "size", "move": "position"}
    for kind, word in changes.items():
        if gone[0].but(**{word: getattr(new[0].shape, word)}) == new[0]:
            return Edit(kind, source, gone[0], new[0])
    return None


def sample_edit(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Edit:
    """A random edit of the training split, or of the held-out one, of a scene of one to four shapes."""
    kind = kind or rng.choice(KINDS)
    while True:
        scene = sample_scene(rng, rng.randint(*SHAPES_BEFORE[kind]))
        edit = _sample_change(rng, scene, kind)
        if edit.is_held_out() == held_out:
            return edit


def _sample_change(rng: random.Random, scene: Scene, kind: str) -> Edit:
    if kind == "add":
        return Edit(kind, scene, None, Placed(sample_placed(rng, rng.choice(scene.free_corners())).shape))
    before = rng.choice(scene.shapes)
    shape = before.shape
    after: Placed | None = None
    if kind == "recolour":
        after = before.but(colour=rng.choice([colour for colour in COLOURS if colour != shape.colour]))
    elif kind == "resize":
        after = before.but(size=_other_size(shape.size))
    elif kind == "move":
        after = before.but(position=rng.choice(scene.free_corners()))
    return Edit(kind, scene, before, after)


def _other_size(size: str) -> str:
    return next(other for other in RADII if other != size)


def held_out_edits(count: int, seed: int) -> list[Edit]:
    """`count` different edits of the held-out split, of each kind as many as of the others."""
    rng = random.Random(f"held out/{seed}")
    edits: dict[str, Edit] = {}
    while len(edits) < count:
        edit = sample_edit(rng, held_out=True, kind=KINDS[len(edits) % len(KINDS)])
        edits.setdefault(f"{edit.source.words} {edit.target.words}", edit)
    return list(edits.values())


def sample_family(rng: random.Random) -> list[Scene]:
    """Eight scenes or fewer that differ in one shape: many edits lead from one to another, for little rendering."""
    rest = sample_scene(rng, rng.choice((0, 1, 1, 2, 2, 3, 3)))
    free = rest.free_corners()
    varied = sample_placed(rng, rng.choice(free))
    if rng.random() < 0.5:
        varied = Placed(varied.shape)  # in the middle, so that it can be added
    colours = rng.sample(list(COLOURS), 3)
    corners = rng.sample(free, len(free))
    variants = [varied.but(colour=colour) for colour in colours]
    variants += [variant.but(size=_other_size(varied.shape.size)) for variant in variants[:2]]
    variants += [variants[i].but(position=c) for i, c in enumerate(corners[:2]) if c != varied.shape.position]
    scenes = [rest.having(variant) for variant in variants]
    return [rest, *scenes] if rest.shapes else scenes


def pairs_among(family: Sequence[Scene]) -> list[tuple[int, int, Edit]]:
    """All edits of the training split from one scene of a family to another, with the numbers of both."""
    pairs = []
    for (i, source), (j, target) in itertools.permutations(enumerate(family), 2):
        edit = edit_between(source, target)
        if edit is not None and not edit.is_held_out():
            pairs.append((i, j, edit))
    return pairs


@dataclass(frozen=True)
class EditScore:
    """What of an edited picture is right.

    Attributes:
        object: the shape that was to change is there, of its kind and size, or gone if it was to go.
        colour: it has its colour.
        place: it is in its corner, and not in the one it left.
        rest: everything else is as it was: the other shapes, each in its place, no more of them, and the background.
    """

    object: bool
    colour: bool
    place: bool
    rest: bool

    @property
    def all(self) -> bool:
        return self.object and self.colour and self.place and self.rest


def score_edit(picture: np.ndarray, edit: Edit) -> EditScore:
    """Judge an edited picture, uint8 [height, width, 3] in RGB, by image analysis alone."""
    found: dict[str, list[FoundShape]] = {corner: [] for corner in CORNERS}
    for each in find_shapes(picture):
        found[_corner(each)].append(each)
    left = edit.before.shape.position if edit.before is not None else None
    rest = _same_background(picture, edit) and all(
        _is_untouched(found[corner], [p for p in edit.source.shapes if p.shape.position == corner])
        for corner in CORNERS
        if corner != left and (edit.after is None or corner != edit.after.shape.position)
    )
    if edit.after is None:
        assert left is not None
        gone = not found[left]
        return EditScore(gone, gone, gone, rest)
    wanted = edit.after.shape
    has_left = left is None or left == wanted.position or not found[left]
    candidates = found[wanted.position] or (found[left] if left is not None else [])
    if len(candidates) != 1:
        return EditScore(False, False, False, rest)
    (shape,) = candidates
    return EditScore(
        object=shape.kind == wanted.kind and _size(shape) == wanted.size,
        colour=shape.colour == wanted.colour,
        place=has_left and bool(found[wanted.position]),
        rest=rest,
    )


def _corner(found: FoundShape) -> str:
    x, y = found.centre[0] * IMAGE_SIZE, found.centre[1] * IMAGE_SIZE
    return min(CORNERS, key=lambda corner: (CORNERS[corner][0] - x) ** 2 + (CORNERS[corner][1] - y) ** 2)


def _radius(found: FoundShape) -> float:
    """Pixels of 128, as in RADII; 0 for a shape without a name."""
    if found.kind is None:
        return 0.0
    outline_area = polygon_moments(np.array(SHAPES[found.kind]))[2]
    return float(IMAGE_SIZE * (found.area / outline_area) ** 0.5)


def _size(found: FoundShape) -> str:
    return min(RADII, key=lambda size: abs(sum(RADII[size]) / 2 - _radius(found)))


def _is_untouched(found: Sequence[FoundShape], was: Sequence[Placed]) -> bool:
    if len(found) != len(was):
        return False
    return all(
        (shape.kind, shape.colour) == (placed.shape.kind, placed.shape.colour)
        and np.hypot(*np.subtract(np.multiply(shape.centre, IMAGE_SIZE), placed.centre)) <= _MAX_SHIFT
        and abs(_radius(shape) - placed.radius) <= _MAX_RADIUS_CHANGE
        for shape, placed in zip(found, was, strict=True)
    )


def _same_background(picture: np.ndarray, edit: Edit) -> bool:
    border = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3), picture[:, :3].reshape(-1, 3)])
    difference = np.abs(np.median(border, axis=0) - BACKGROUNDS[edit.source.background])
    return bool(difference.max() <= _MAX_BACKGROUND_CHANGE)
