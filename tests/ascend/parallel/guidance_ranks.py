"""What each of two ranks does for test_shared_batch.py: it draws with shared guidance, and writes what it saw as JSON.

PYTHONPATH=. python examples/launch.py --device_list 0,1 -- tests/ascend/parallel/guidance_ranks.py MODEL FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from ascend.parallel import Mesh, ParallelError, process_group, share_guidance, shared_batch, unshare_guidance

INTERVAL = {"cache_interval": 2}
FORECAST = {"cache_schedule": [0, 1, 3, 6], "cache_forecast": True, "cache_between": "mixed"}


def draw(
    pipe: StableDiffusionPipeline,
    prompt: str = "a cat",
    steps: int = 4,
    seed: int | None = 0,
    number: int = 3,
    cache: Mapping[str, Any] = INTERVAL,
) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(prompt, num_images_per_prompt=number, generator=generator, **size, **cache).images


def draw_with_forecasts(pipe: StableDiffusionPipeline) -> list[torch.Tensor]:
    return [draw(pipe, steps=8, number=number, cache=FORECAST) for number in (1, 3)]


@torch.no_grad()
def call_by_name(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return pipe.unet(encoder_hidden_states=prompt, timestep=torch.tensor([5, 5]), sample=sample).sample


def refusal(pipe: StableDiffusionPipeline, **options: Any) -> str:
    try:
        draw(pipe, **options)
    except ParallelError as error:
        return str(error)
    return "drawn"


def run(pipe: StableDiffusionPipeline, mesh: Mesh) -> dict[str, Any]:
    alone = [draw(pipe), draw(pipe, "a dog", seed=1)]
    alone_by_name = call_by_name(pipe)
    forecast_alone = draw_with_forecasts(pipe)
    compared: list[int] = []
    differences = shared_batch.differences
    shared_batch.differences = lambda *fingerprints: compared.append(1) or differences(*fingerprints)
    share_guidance(pipe, mesh)
    together = [draw(pipe), draw(pipe, "a dog", seed=1)]
    comparisons = len(compared)
    by_name = call_by_name(pipe)
    compared.clear()
    forecast_together = draw_with_forecasts(pipe)
    comparisons_of_forecasts = len(compared)
    seen: dict[str, Any] = {
        "latents": refusal(pipe, seed=None),
        "prompts": refusal(pipe, prompt=f"a picture of {mesh.rank}"),
        "timesteps": refusal(pipe, steps=4 + mesh.rank),
    }
    unshare_guidance(pipe)
    together.append(draw(pipe))
    pictures = zip([*alone, alone[0]], together, strict=True)
    return seen | {
        "difference of two pictures": max((one - two).abs().max().item() for one, two in pictures),
        "difference with keyword arguments and an output class": (alone_by_name - by_name).abs().max().item(),
        "comparisons of two pictures": comparisons,
        "difference with forecasts": max(
            (one - two).abs().max().item() for one, two in zip(forecast_alone, forecast_together, strict=True)
        ),
        "comparisons with forecasts": comparisons_of_forecasts,
    }


def main(model: str, folder: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with process_group(torch.device("cpu"), branch_size=2) as mesh:
        torch.seed()
        Path(folder, f"rank{mesh.rank}.json").write_text(json.dumps(run(pipe, mesh)))


if __name__ == "__main__":
    main(*sys.argv[1:])
