"""The pictures of one call of the pipeline, and what those of a whole run cost."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ascend.device import DeviceManager
from runners.messages import shown
from runners.overflow import clear_overflow_flag, overflow_warning
from runners.stable_diffusion.encoded_prompts import EncodedPrompts
from runners.stable_diffusion.inputs import call_arguments, keep_the_rest
from runners.stable_diffusion.prompts import text_arguments

COMPILING = (
    "the first picture compiles a graph for each kind of step: about a minute for the demo model, several for SD2.1, "
    "less when these options and this size were there before"
)
UNSAFE = "the model's safety checker took a picture for unsafe and made it black; another seed or prompt may pass"


@dataclass(frozen=True)
class Call:
    """The pictures of prompt `number`, and the seconds for them; `loop_seconds` end with the last denoising step.

    `warnings` say what is wrong with the pictures.
    """

    number: int
    images: list[Image.Image]
    warnings: list[str]
    seconds: float
    loop_seconds: float


@dataclass
class Costs:
    """What the pictures of a run cost so far; `peak_memory` is in bytes."""

    warmup_seconds: list[float]  # of each untimed call
    pictures: int = 0
    calls: int = 0
    seconds: float = 0.0
    loop_seconds: float = 0.0
    peak_memory: int = 0

    def add(self, call: Call) -> None:
        self.pictures += len(call.images)
        self.calls += 1
        self.seconds += call.seconds
        self.loop_seconds += call.loop_seconds

    def seconds_to_compile(self) -> float | None:
        """What the first warm-up took beyond a later call; None without a warm-up."""
        return self.warmup_seconds[0] - self.seconds / self.calls if self.warmup_seconds else None

    def seconds_per_image(self) -> float:
        return self.seconds / self.pictures

    def seconds_per_step(self, steps: int) -> float:
        """Of one denoising step, which serves all pictures of a call."""
        return self.loop_seconds / (self.calls * steps)


def warm_up(
    pipe: StableDiffusionPipeline,
    args: argparse.Namespace,
    manager: DeviceManager,
    cache: dict[str, Any],
    compiled: bool = False,
    quiet: bool = False,
) -> list[float]:
    """Call the pipeline `args.warmup` times, without a bar, whose rate would tell nothing of the calls that follow.

    Says instead what takes the time, unless `quiet`. Later calls have a bar unless `quiet`. The result is the seconds
    of each call.
    """
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    for number in range(args.warmup):
        if not quiet:
            what = COMPILING if compiled and number == 0 else f"warm-up {number + 1} of {args.warmup}"
            print(f"{what} ...", file=sys.stderr, flush=True)
        with nullcontext() if quiet else shown("ascend.graphs"):  # a line when a graph is begun and when it is there
            seconds.append(call_pipeline(pipe, args, manager, 0, cache).seconds)
        if not quiet:
            print(f"... took {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    pipe.set_progress_bar_config(disable=quiet)
    return seconds


def call_pipeline(
    pipe: StableDiffusionPipeline,
    args: argparse.Namespace,
    manager: DeviceManager,
    number: int,
    cache: dict[str, Any],
    encoded: EncodedPrompts | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Call:
    """The pictures of prompt `number`. Each has its own generator, on the CPU: any one can be drawn again alone.

    `on_step(step, steps)` is called after each step; what it raises ends the call.
    """
    loop_end = 0.0

    def on_step_end(
        pipe: StableDiffusionPipeline, step: int, timestep: int, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        nonlocal loop_end
        if on_step is not None:
            on_step(step + 1, pipe.num_timesteps)
        if step == pipe.num_timesteps - 1:  # at no other step: waiting for the device holds it up
            manager.synchronize()
            loop_end = time.perf_counter()
        return {}

    clear_overflow_flag(manager.device)
    manager.synchronize()
    start = time.perf_counter()
    drawn = pipe(
        **text_arguments(pipe, args, args.prompts[number], encoded),
        num_inference_steps=args.steps,
        **call_arguments(args),
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images,
        generator=[manager.create_generator(seed) for seed in seeds_of(args, number)],
        callback_on_step_end=on_step_end,
        **cache,
    )
    manager.synchronize()
    seconds = time.perf_counter() - start
    warnings = picture_warnings(drawn.images, drawn.nsfw_content_detected, manager.device)
    return Call(number, keep_the_rest(drawn.images, args), warnings, seconds, loop_seconds=loop_end - start)


def picture_warnings(images: Sequence[Image.Image], unsafe: Sequence[bool] | None, device: torch.device) -> list[str]:
    """What is wrong with the pictures of a call; `unsafe` says what the safety checker found, if there is one."""
    refused = unsafe or [False] * len(images)
    warnings = [UNSAFE] if any(refused) else []
    overflow = overflow_warning([image for image, bad in zip(images, refused, strict=True) if not bad], device)
    return [*warnings, overflow] if overflow else warnings


def seeds_of(args: argparse.Namespace, number: int) -> range:
    """Of the pictures of prompt `number`: consecutive over all pictures of a run."""
    first = args.seed + number * args.num_images
    return range(first, first + args.num_images)
