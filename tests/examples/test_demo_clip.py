"""The demo CLIP in the repository knows what scenes show that it has never seen."""

from PIL import Image

from runners.clip import CLIPInferenceService
from scripts.demo_clip.evaluate import features, share_among
from scripts.demo_clip.train import DEMO_CLIP
from scripts.demo_model.scenes import held_out_scenes


def test_it_finds_the_caption_of_a_picture() -> None:
    service = CLIPInferenceService(str(DEMO_CLIP), "cpu")
    scenes = held_out_scenes(300, seed=7)
    texts = service.extract_text_features([scene.caption() for scene in scenes])
    similarity = features(service, scenes, seed=7) @ texts.T
    assert share_among(similarity, 4, seed=0) >= 0.99
    assert share_among(similarity, 64, seed=0) >= 0.95


def test_a_picture_of_something_else_has_another_answer() -> None:
    service = CLIPInferenceService(str(DEMO_CLIP), "cpu")
    texts = [scene.caption() for scene in held_out_scenes(20, seed=1)]
    found = service.batch_predict([Image.fromarray(scene.render()) for scene in held_out_scenes(20, seed=1)], texts, 8)
    assert sum(result["best_match"] == text for result, text in zip(found, texts, strict=True)) >= 19
    assert sum(result["best_score"] for result in found) / len(found) > 0.8


def test_it_is_small() -> None:
    files = [path for path in DEMO_CLIP.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert {path.name for path in files} == {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
