"""The pictures of one call of the pipeline, those of a whole run, and what they cost."""

import argparse
import time
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from ascend.device import DeviceManager


@dataclass(frozen=True)
class Call:
    """The pictures of prompt `number`, and the seconds for them; `loop_seconds` end with the last denoising step."""

    number: int
    images: list[Image.Image]
    seconds: float
    loop_seconds: float


@dataclass(frozen=True)
class Drawing:
    """All pictures of a run and what they cost."""

    calls: list[Call]
    warmup_seconds: list[float]  # of each untimed call
    peak_memory: int  # bytes

    @property
    def images(self) -> list[Image.Image]:
        return [image for call in self.calls for image in call.images]

    def seconds_to_compile(self) -> float | None:
        """What the first warm-up took beyond a later call; None without a warm-up."""
        later = sum(call.seconds for call in self.calls) / len(self.calls)
        return self.warmup_seconds[0] - later if self.warmup_seconds else None

    def seconds_per_image(self) -> float:
        return sum(call.seconds for call in self.calls) / len(self.images)

    def seconds_per_step(self, steps: int) -> float:
        """Of one denoising step, which serves all pictures of a call."""
        return sum(call.loop_seconds for call in self.calls) / (len(self.calls) * steps)


def call_pipeline(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, manager: DeviceManager, number: int, cache: dict[str, Any]
) -> Call:
    """The pictures of prompt `number`. Each has its own generator, on the CPU: any one can be drawn again alone."""
    loop_end = 0.0

    def on_step_end(
        pipe: StableDiffusionPipeline, step: int, timestep: int, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        nonlocal loop_end
        if step == pipe.num_timesteps - 1:  # at no other step: waiting for the device holds it up
            manager.synchronize()
            loop_end = time.perf_counter()
        return {}

    manager.synchronize()
    start = time.perf_counter()
    images = pipe(
        args.prompts[number],
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images,
        generator=[manager.create_generator(seed) for seed in seeds_of(args, number)],
        callback_on_step_end=on_step_end,
        **cache,
    ).images
    manager.synchronize()
    return Call(number, images, seconds=time.perf_counter() - start, loop_seconds=loop_end - start)


def seeds_of(args: argparse.Namespace, number: int) -> range:
    """Of the pictures of prompt `number`: consecutive over all pictures of a run."""
    first = args.seed + number * args.num_images
    return range(first, first + args.num_images)
