"""The same pictures drawn in many ways, and how far each way is from the picture of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from processors import disable_token_merging, enable_token_merging
from runners.schedulers import make_scheduler

PEAK = 1.0  # of pictures as floating-point numbers
IDENTICAL = 100.0  # dB, of pictures without a difference
WORST = 0.1  # share of the pictures
RATIO = 0.5  # of merged tokens, where a method is measured against tomesd
MAX_DOWNSAMPLE = 1  # in the blocks that tomesd chooses


class Method(NamedTuple):
    """A way to draw.

    Attributes:
        options: the pipeline's arguments.
        steps, scheduler: other than those of the picture of all steps; the scheduler by its short name.
        ratio: of merged tokens, as tomesd chooses its blocks.
    """

    options: Mapping[str, Any] = {}
    steps: int | None = None
    scheduler: str | None = None
    ratio: float = 0.0


class Distance(NamedTuple):
    """In dB of PSNR, the mean over pictures and the mean of the worst tenth of them."""

    psnr: float
    worst_tenth: float

    def reaches(self, other: Distance) -> bool:
        return self.psnr >= other.psnr and self.worst_tenth >= other.worst_tenth

    def raised(self, by: float) -> Distance:
        return Distance(self.psnr + by, self.worst_tenth + by)


class Drawing(NamedTuple):
    """What is drawn: `prompts`, the first with `seed`, the next with seed + 1 ..."""

    prompts: Sequence[str]
    seed: int
    steps: int
    guidance_scale: float
    batch_size: int


def draw(pipe: StableDiffusionPipeline, drawing: Drawing, method: Method, name: str) -> np.ndarray:
    """Float pictures [count, height, width, 3] from 0 to 1. The pipeline is left as it was."""
    pictures = []
    with ExitStack() as undo:
        if method.ratio:
            enable_token_merging(pipe, ratio=method.ratio, max_downsample=MAX_DOWNSAMPLE)
            undo.callback(disable_token_merging, pipe)
        if method.scheduler:
            undo.callback(setattr, pipe, "scheduler", pipe.scheduler)
            pipe.scheduler = make_scheduler(method.scheduler, like=pipe.scheduler)
        starts = range(0, len(drawing.prompts), drawing.batch_size)
        for start in tqdm(starts, desc=name, unit="batch", leave=False):
            prompts = list(drawing.prompts[start : start + drawing.batch_size])
            seeds = range(drawing.seed + start, drawing.seed + start + len(prompts))
            pictures.append(
                pipe(
                    prompts,
                    num_inference_steps=method.steps or drawing.steps,
                    guidance_scale=drawing.guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="np",
                    **method.options,
                ).images
            )
    return np.concatenate(pictures)


def distance(pictures: np.ndarray, reference: np.ndarray) -> Distance:
    errors = np.square(pictures.astype(np.float64) - reference).mean((1, 2, 3))
    psnr = 10 * np.log10(PEAK**2 / np.maximum(errors, PEAK**2 * 10 ** (-IDENTICAL / 10)))
    return Distance(float(psnr.mean()), worst_tenth(psnr))


def worst_tenth(values: np.ndarray) -> float:
    """The mean of the least tenth, of one at least."""
    return float(np.sort(values)[: max(1, round(WORST * len(values)))].mean())
