"""The training of the photo model, at a few steps: that it resumes exactly, and that its export is a pipeline."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from scripts.photo_model import train
from scripts.photo_model.photos import CAPTIONS, PHOTOS, crop, load_photo

TINY = ["--device", "cpu", "--crops", "14", "--save_every", "1", "--draw_steps", "1", "--grid_rows", "2"]
TINY += [f"--{stage}_{what}={number}" for stage in ("vae", "unet") for what, number in (("steps", 2), ("batch", 2))]


def run(folder: Path, *arguments: str) -> None:
    train.main(["--work_dir", str(folder / "work"), "--output_dir", str(folder / "model"), *TINY, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photo")
    run(folder)
    return folder


def test_export_predicts_the_velocity_and_draws_from_a_caption(trained: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe("a photo of a cat", num_inference_steps=2).images[0].size == (128, 128)
    assert json.loads((trained / "model/defaults.json").read_text()) == {"guidance_scale": 3.0}


def test_grid_has_a_column_for_each_photograph(trained: Path) -> None:
    for name, rows in (("vae", 2), ("unet", 1), ("grid", 2)):
        assert Image.open(trained / f"work/{name}.png").size == (128 * len(PHOTOS), 128 * rows), name


def test_interrupted_training_ends_at_the_same_weights_and_exports_before(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, exported = trained / "work/unet.safetensors", trained / "model/unet/diffusion_pytorch_model.safetensors"
    expected, finished = weights.read_bytes(), exported.read_bytes()
    (trained / "work/unet.pt").unlink()

    def stop_after_saving(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "draw_row", stop_after_saving)
        run(trained, "--stage", "unet")
    assert torch.load(trained / "work/unet.pt", weights_only=True)["done"] == 1
    run(trained, "--stage", "export")
    assert exported.read_bytes() != finished

    run(trained, "--stage", "unet")
    run(trained, "--stage", "export")
    assert weights.read_bytes() == expected
    assert exported.read_bytes() == finished


def test_text_encoder_tells_captions_apart(trained: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    captions = [caption for wordings in CAPTIONS.values() for caption in wordings]
    tokens = pipe.tokenizer(captions, padding=True, return_tensors="pt").input_ids
    seen = pipe.text_encoder(tokens).pooler_output
    likeness = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1).detach()
    photos = torch.arange(len(PHOTOS)).repeat_interleave(len(captions) // len(PHOTOS))
    same = photos[:, None] == photos[None]
    assert likeness[same].min() > likeness[~same].max()


@pytest.mark.parametrize("size", [64, 128])
def test_crops_are_squares_of_every_photograph(size: int) -> None:
    for name in PHOTOS:
        pictures = [crop(load_photo(name), random.Random(seed), size) for seed in (0, 0, 1)]
        assert {(picture.shape, picture.dtype) for picture in pictures} == {((size, size, 3), np.dtype(np.uint8))}
        np.testing.assert_array_equal(pictures[0], pictures[1])
        assert (pictures[0] != pictures[2]).any(), name


def test_no_two_photographs_share_a_caption() -> None:
    captions = [caption for wordings in CAPTIONS.values() for caption in wordings]
    assert len(set(captions)) == len(captions)
