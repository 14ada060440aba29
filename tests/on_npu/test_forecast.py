"""Steps that are forecast, on the chip: no waits, one graph for each kind of step, the CPU's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend import compile_pipeline
from processors import enable_flash_attention
from runners.schedulers import make_scheduler
from tests.on_npu.helpers import SATURATES

HALF = torch.float16 if SATURATES else torch.bfloat16
TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.12}[HALF]  # see test_pipelines.py
STEPS = 10
FORECAST: dict[str, Any] = {"cache_schedule": [0, 1, 3, 6, 8], "cache_forecast": True, "cache_between": "mixed"}


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    yield
    torch.npu.set_sync_debug_mode("default")


def draw(pipe: StableDiffusionPipeline, prompt: str = "a red circle", **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "num_images_per_prompt": 2}
    latents = pipe(prompt, generator=generator, output_type="latent", **size, **FORECAST, **options).images
    return latents.cpu().float()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler", "pndm"])
def test_forecasts_are_those_of_the_cpu_and_no_step_waits(
    npu: torch.device, small_sd: StableDiffusionPipeline, name: str, prediction_type: str
) -> None:
    small_sd.scheduler = make_scheduler(name, small_sd.scheduler)
    small_sd.scheduler.register_to_config(prediction_type=prediction_type)
    expected = draw(small_sd)

    def forbid_waits(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        last = step == pipe.num_timesteps - 1
        torch.npu.set_sync_debug_mode("default" if last else "error")  # the first step finds its place in the tables
        return tensors

    drawn = draw(small_sd.to(npu, HALF), callback_on_step_end=forbid_waits)
    assert difference(drawn, expected) < TOLERANCE


def test_each_kind_of_step_has_one_graph_for_all_pictures(
    npu: torch.device, small_sd: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe = small_sd.to(npu, HALF)
    enable_flash_attention(pipe)
    prompts = ("a red circle", "a blue square", "two green stars")
    eager = [draw(pipe, prompt) for prompt in prompts]
    compile_pipeline(pipe, tmp_path)
    compiled = []
    for prompt in prompts:
        compiled.append(draw(pipe, prompt))
        assert pipe.unet.forward.compilations == len(pipe.unet.forward.graphs) == 2  # full and shallow
    for found, expected in zip(compiled, eager, strict=True):
        assert difference(found, expected) < TOLERANCE
