import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from scripts.demo_model.scenes import (
    MAX_HELD_OUT,
    Scene,
    Score,
    Shape,
    find_shapes,
    held_out_scenes,
    sample_scene,
    score_image,
)

RED_CIRCLE = Shape("large", "red", "circle", "left")
BLUE_SQUARE = Shape("small", "blue", "square", "right")
PAIR = Scene((RED_CIRCLE, BLUE_SQUARE), "white")


def random_scenes(count: int) -> list[tuple[Scene, random.Random]]:
    generators = [random.Random(f"test/{number}") for number in range(count)]
    return [(sample_scene(rng, held_out=bool(number % 2)), rng) for number, rng in enumerate(generators)]


def soften(image: np.ndarray) -> np.ndarray:
    """What a mediocre VAE does to a picture: blurred edges and a little noise."""
    blurred = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).resize((128, 128))
    noise = np.random.default_rng(0).normal(0, 5, image.shape)
    return (np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8)


def test_caption_says_what_the_scene_shows():
    caption = "a large red circle on the left and a small blue square on the right, white background"
    assert PAIR.caption() == caption


def test_captions_vary_in_wording_and_order():
    captions = {PAIR.caption(random.Random(seed)) for seed in range(20)}
    assert len(captions) == 4
    assert "a small blue square on the right and a large red circle on the left on a white background" in captions


def test_same_seed_gives_the_same_picture():
    first, second = (sample_scene(rng).render(rng) for rng in (random.Random(3), random.Random(3)))
    assert first.shape == (128, 128, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_held_out_scenes_are_never_trained_on():
    rng = random.Random(0)
    trained = {sample_scene(rng) for _ in range(3000)}
    held_out = held_out_scenes(500, seed=1)
    assert len(set(held_out)) == 500
    assert trained.isdisjoint(held_out)


def test_the_split_ignores_the_order_of_the_objects():
    for scene, _ in random_scenes(100):
        assert scene.is_held_out() == replace(scene, shapes=scene.shapes[::-1]).is_held_out()


def test_more_held_out_scenes_than_there_are():
    with pytest.raises(ValueError, match=f"there are {MAX_HELD_OUT} held-out scenes, not {MAX_HELD_OUT + 1}"):
        held_out_scenes(MAX_HELD_OUT + 1, seed=0)


def test_rendered_scenes_are_right():
    for scene, rng in random_scenes(200):
        assert score_image(scene.render(rng), scene).all, scene


def test_blurred_noisy_scenes_are_right():
    scores = [score_image(soften(scene.render(rng)), scene).all for scene, rng in random_scenes(200)]
    assert np.mean(scores) >= 0.98


def test_pictures_of_other_scenes_are_wrong():
    scenes = random_scenes(200)
    scores = [
        score_image(scene.render(), other).all for (scene, _), (other, _) in zip(scenes, scenes[1:], strict=False)
    ]
    assert np.mean(scores) <= 0.02


@pytest.mark.parametrize(
    ("change", "score"),
    [
        ({"colour": "orange"}, Score(colour=False, shape=True, position=True)),
        ({"kind": "cross"}, Score(colour=True, shape=False, position=True)),
        ({"position": "centre"}, Score(colour=True, shape=True, position=False)),
        ({"size": "small"}, Score(colour=True, shape=True, position=True)),
    ],
)
@pytest.mark.parametrize("background", ["white", "grey", "black"])
def test_each_aspect_is_judged_alone(background: str, change: dict[str, str], score: Score):
    drawn = Scene((replace(RED_CIRCLE, **change),), background)
    assert score_image(drawn.render(), Scene((RED_CIRCLE,), background)) == score


def test_swapped_colours_are_wrong():
    swapped = Scene((replace(RED_CIRCLE, colour="blue"), replace(BLUE_SQUARE, colour="red")), "white")
    assert score_image(swapped.render(), PAIR) == Score(colour=False, shape=True, position=True)


@pytest.mark.parametrize(
    "shapes", [(), (RED_CIRCLE,), (RED_CIRCLE, BLUE_SQUARE, replace(BLUE_SQUARE, position="top"))]
)
def test_wrong_number_of_objects_is_wrong_in_everything(shapes: tuple[Shape, ...]):
    assert score_image(Scene(shapes, "white").render(), PAIR) == Score(False, False, False)


def test_shapes_without_a_name_get_none():
    image = np.full((128, 128, 3), 245, dtype=np.uint8)
    image[40:50, 20:100] = (220, 30, 40)  # a red bar
    (found,) = find_shapes(image)
    assert found.kind is None
    assert found.colour == "red"


def test_colours_without_a_name_get_none():
    image = np.full((128, 128, 3), 245, dtype=np.uint8)
    image[40:80, 40:80] = (120, 60, 10)  # a brown square
    (found,) = find_shapes(image)
    assert found.colour is None
    assert found.kind == "square"
