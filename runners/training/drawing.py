"""Pictures that show how far a training is."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from runners.images import GridRow, save_png, side_by_side
from runners.training.settings import Settings


@torch.no_grad()
def draw_validation(
    pipe: StableDiffusionPipeline, unet: UNet2DConditionModel, settings: Settings, device: torch.device
) -> list[Image.Image]:
    """A picture of each validation prompt, with seeds of its own, as run_sd.py would draw it.

    VAE and text encoder are on `device` for that time alone. Every rank has to call it where weights are in shards.
    """
    was_training = unet.training
    unet.eval()
    pipe.unet = unet
    for part in (pipe.vae, pipe.text_encoder):
        part.to(device)
    try:
        size = settings.resolution
        return [
            pipe(
                prompt,
                num_inference_steps=settings.validation_steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed + number),
                height=size,
                width=size,
            ).images[0]
            for number, prompt in enumerate(settings.validation_prompts)
        ]
    finally:
        pipe.unet = None
        for part in (pipe.vae, pipe.text_encoder):
            part.to("cpu")
        unet.train(was_training)


def save_validation(pictures: list[Image.Image], settings: Settings, step: int, folder: Path) -> None:
    """One sheet, `step-00000100.png`."""
    folder.mkdir(exist_ok=True)
    rows = [GridRow(prompt, [picture]) for prompt, picture in zip(settings.validation_prompts, pictures, strict=True)]
    save_png(side_by_side([f"step {step}"], rows), folder / f"step-{step:08}.png", {"step": str(step)})
