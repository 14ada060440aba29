"""Edits of scenes, their wordings and their judge."""

import random
from dataclasses import replace

import numpy as np
import pytest

from scripts.demo_hidream.edits import (
    KINDS,
    Edit,
    EditScore,
    edit_between,
    held_out_edits,
    pairs_among,
    sample_edit,
    sample_family,
    score_edit,
)
from scripts.demo_hidream.networks import TEXT_LENGTH, build_tokenizer
from scripts.demo_hidream.scenes import Placed, Scene
from scripts.demo_model.scenes import Shape

CIRCLE = Placed(Shape("large", "red", "circle", "top left"), (1.0, -2.0), 0.2)
SQUARE = Placed(Shape("small", "blue", "square", "bottom right"))
CROSS = Placed(Shape("small", "green", "cross", "top right"))
PAIR = Scene((CIRCLE, SQUARE), "white")
EDITS = {
    "recolour": Edit("recolour", PAIR, CIRCLE, CIRCLE.but(colour="yellow")),
    "resize": Edit("resize", PAIR, CIRCLE, CIRCLE.but(size="small")),
    "move": Edit("move", PAIR, CIRCLE, CIRCLE.but(position="bottom left")),
    "remove": Edit("remove", PAIR, CIRCLE, None),
    "add": Edit("add", PAIR, None, CROSS),
}
RIGHT = EditScore(object=True, colour=True, place=True, rest=True)


def edits_of(count: int) -> list[Edit]:
    return [sample_edit(random.Random(f"test/{n}"), kind=KINDS[n % len(KINDS)]) for n in range(count)]


def test_rendered_targets_are_right_and_sources_are_wrong():
    for edit in edits_of(60):
        assert score_edit(edit.target.render(), edit) == RIGHT, edit
        assert not score_edit(edit.source.render(), edit).all, edit


@pytest.mark.parametrize(
    ("kind", "drawn", "wrong"),
    [
        ("recolour", (CIRCLE.but(colour="purple"), SQUARE), {"colour"}),
        ("recolour", (CIRCLE.but(colour="yellow", kind="square"), SQUARE), {"object"}),
        (
            "recolour",
            (CIRCLE.but(colour="yellow", position="top right"), SQUARE),
            {"object", "colour", "place", "rest"},
        ),
        ("recolour", (CIRCLE.but(colour="yellow"), SQUARE.but(colour="yellow")), {"rest"}),
        ("resize", (CIRCLE, SQUARE), {"object"}),
        ("resize", (CIRCLE.but(size="small"),), {"rest"}),
        ("move", (CIRCLE, SQUARE), {"place"}),
        ("move", (CIRCLE, CIRCLE.but(position="bottom left"), SQUARE), {"place"}),
        ("remove", (CIRCLE, SQUARE), {"object", "colour", "place"}),
        ("remove", (SQUARE.but(size="large"),), {"rest"}),
        ("remove", (replace(SQUARE, offset=(-9.0, 0.0)),), {"rest"}),
        ("add", (CIRCLE, SQUARE), {"object", "colour", "place"}),
        ("add", (CIRCLE, SQUARE, CROSS.but(colour="red")), {"colour"}),
        ("add", (CIRCLE, SQUARE, CROSS.but(position="bottom left")), {"object", "colour", "place", "rest"}),
    ],
)
def test_each_aspect_is_judged_alone(kind: str, drawn: tuple[Placed, ...], wrong: set[str]):
    score = score_edit(Scene(drawn, "white").render(), EDITS[kind])
    assert {aspect for aspect in ("object", "colour", "place", "rest") if not getattr(score, aspect)} == wrong


def test_another_background_is_wrong():
    target = EDITS["remove"].target
    assert score_edit(replace(target, background="grey").render(), EDITS["remove"]) == replace(RIGHT, rest=False)


def test_instructions_name_no_other_shape():
    twin = SQUARE.but(position="top right")
    edit = Edit("recolour", Scene((CIRCLE, SQUARE, twin), "white"), SQUARE, SQUARE.but(colour="green"))
    assert edit.names() == ["the square in the bottom right"]
    assert EDITS["recolour"].instruction() == "make the circle yellow"
    assert {EDITS["resize"].instruction(random.Random(seed)) for seed in range(40)} == {
        f"{verb} the {name}{end}"
        for verb, end in (("make", " smaller"), ("shrink", ""))
        for name in ("circle", "red circle", "red shape", "circle in the top left")
    }


def test_texts_are_read_whole():
    tokenizer, rng = build_tokenizer(), random.Random(0)
    for edit in edits_of(100):
        for text in (edit.instruction(rng), edit.target.description(rng)):
            tokens = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in tokens, text
            assert len(tokens) <= TEXT_LENGTH, text


def test_held_out_edits_are_never_trained_on():
    held_out = held_out_edits(200, seed=0)
    words = {(edit.source.words, edit.target.words) for edit in held_out}
    assert len(words) == 200
    assert [sum(edit.kind == kind for edit in held_out) for kind in KINDS] == [40] * 5
    trained = set()
    for number in range(300):
        family = sample_family(random.Random(number))
        trained |= {(edit.source.words, edit.target.words) for _, _, edit in pairs_among(family)}
        unfiltered = [edit_between(a, b) for a in family for b in family]
        left_out = {(e.source.words, e.target.words) for e in unfiltered if e is not None and e.is_held_out()}
        assert trained.isdisjoint(left_out)
    assert trained.isdisjoint(words)
    assert len(trained) > 3000


def test_pairs_of_a_family_are_what_their_edits_say():
    kinds = set()
    for number in range(20):
        family = sample_family(random.Random(number))
        for source, target, edit in pairs_among(family):
            assert edit.source == family[source]
            assert set(edit.target.shapes) == set(family[target].shapes)
            kinds.add(edit.kind)
    assert kinds == set(KINDS)


def test_same_seed_gives_the_same_picture():
    first, second = (sample_edit(random.Random(3)).target.render() for _ in range(2))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
