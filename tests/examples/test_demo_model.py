"""The demo model in the repository draws what the demo prompts say."""

import json

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from ascend.device import DeviceManager
from processors import enable_flash_attention, enable_token_merging
from scripts.demo_model.scenes import Scene, Shape, score_image
from tests.programs import ROOT

DEMO_MODEL = ROOT / "examples/sd2.1/demo_model"
DEMO_PROMPTS = ROOT / "examples/sd2.1/prompts.txt"
SCENES = {
    "a large red circle in the centre, white background": Scene((Shape("large", "red", "circle", "centre"),), "white"),
    "a small blue square on the left and a large yellow triangle on the right, black background": Scene(
        (Shape("small", "blue", "square", "left"), Shape("large", "yellow", "triangle", "right")), "black"
    ),
    "a large green cross at the top and a small purple circle at the bottom on a grey background": Scene(
        (Shape("large", "green", "cross", "top"), Shape("small", "purple", "circle", "bottom")), "grey"
    ),
    "a large orange triangle in the centre on a black background": Scene(
        (Shape("large", "orange", "triangle", "centre"),), "black"
    ),
}


def test_every_demo_prompt_has_its_scene() -> None:
    assert DEMO_PROMPTS.read_text(encoding="utf-8").splitlines() == list(SCENES)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_pictures_match_their_prompts(accelerated: bool) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, dtype=DeviceManager("cpu").dtype)
    pipe.set_progress_bar_config(disable=True)
    cache = {}
    if accelerated:
        enable_flash_attention(pipe)
        enable_token_merging(pipe, ratio=0.5)
        cache = {"cache_interval": 3}
    generators = [DeviceManager("cpu").create_generator(seed) for seed in range(len(SCENES))]
    pictures = pipe(list(SCENES), generator=generators, guidance_scale=1.5, output_type="np", **cache).images
    for picture, (prompt, scene) in zip((pictures * 255).round().astype(np.uint8), SCENES.items(), strict=True):
        assert score_image(picture, scene).all, prompt


def test_the_model_is_small_and_has_sd21s_topology() -> None:
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    unet = json.loads((DEMO_MODEL / "unet/config.json").read_text())
    assert len(unet["block_out_channels"]) == 4
    assert unet["layers_per_block"] == 2
    assert unet["use_linear_projection"] is True
    scheduler = json.loads((DEMO_MODEL / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == ("PNDMScheduler", "epsilon")
