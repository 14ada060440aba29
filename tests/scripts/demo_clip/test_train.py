"""The demo CLIP's training at a few steps, its examples, and the judge that it is."""

import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from runners.clip import CLIPInferenceService
from scripts.demo_clip import train
from scripts.demo_clip.judge import agreement, judge
from scripts.demo_clip.networks import same, training_scenes, variants
from scripts.demo_model.scenes import Scene, Score, Shape, held_out_scenes, sample_scene

PAIR = Scene((Shape("large", "red", "circle", "left"), Shape("small", "blue", "square", "right")), "white")


def run(folder: Path) -> None:
    options = ["--device", "cpu", "--steps", "4", "--batch", "4", "--save_every", "2"]
    train.main(["--work_dir", str(folder / "work"), "--output_dir", str(folder / "model"), *options])


def test_interrupted_training_ends_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    weights = tmp_path / "model/model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    (tmp_path / "work/clip.pt").unlink()
    save = train.fit.__globals__["save_tensors"]

    def stop_after_saving(state: object, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setitem(train.fit.__globals__, "save_tensors", stop_after_saving)
        run(tmp_path)
    assert torch.load(tmp_path / "work/clip.pt", weights_only=True)["done"] == 2
    run(tmp_path)
    assert weights.read_bytes() == expected
    assert CLIPModel.from_pretrained(tmp_path / "model").dtype == torch.float16
    assert CLIPProcessor.from_pretrained(tmp_path / "model").tokenizer.model_max_length == 77


def test_training_never_sees_a_held_out_scene_nor_one_twice() -> None:
    rng = random.Random(0)
    for _ in range(5):
        scenes = training_scenes(rng, 60)
        assert len(scenes) == 60 and not any(scene.is_held_out() for scene in scenes)
        assert not any(same(a, b) for n, a in enumerate(scenes) for b in scenes[:n])


def test_variants_differ_in_what_they_are_called() -> None:
    found = variants(PAIR)
    assert {name: len(others) for name, others in found.items()} == {
        "background": 2, "position": 3, "size": 2, "colour": 10, "kind": 6
    }  # fmt: skip
    assert {len(others) for others in variants(Scene(PAIR.shapes[:1], "white")).values()} == {2, 4, 1, 5, 3}
    rng = random.Random(1)
    for scene in (sample_scene(rng) for _ in range(50)):
        assert not any(same(other, scene) for others in variants(scene).values() for other in others)


def test_agreement_is_of_each_aspect() -> None:
    right, no_colour = Score(True, True, True), Score(False, True, True)
    assert agreement([right, right], [right, no_colour]) == {
        "colour": 50, "shape": 100, "position": 100, "all": 50
    }  # fmt: skip


def test_the_demo_clip_judges_renderings() -> None:
    """Right captions are right, and a word that is wrong is what is found wrong."""
    service = CLIPInferenceService(str(train.DEMO_CLIP), "cpu")
    scenes = held_out_scenes(20, seed=3)
    pictures = [scene.render() for scene in scenes]
    assert sum(judge(service, picture, scene).all for picture, scene in zip(pictures, scenes, strict=True)) >= 17
    for name, aspect in (("colour", "colour"), ("kind", "shape"), ("position", "position")):
        wrong = [
            judge(service, picture, variants(scene)[name][0]) for picture, scene in zip(pictures, scenes, strict=True)
        ]
        assert sum(getattr(each, aspect) for each in wrong) <= 2, aspect
