"""Stable Diffusion 2.1 as the page uses it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import StableDiffusionPipeline
from PIL import Image

from ascend.device import DeviceManager, get_device_info
from runners.checkpoint import check_model
from runners.cli import UserError
from runners.report import Report, versions
from runners.stable_diffusion.arguments import parse_arguments
from runners.stable_diffusion.pictures import call_pipeline, seeds_of
from runners.stable_diffusion.pipeline import accelerate, check_before_loading, make_pipeline, settings_in_use
from runners.stable_diffusion.prompts import warn_of_long_prompts
from runners.web.worker import OnStep

STEPS, GUIDANCE_SCALE, NUM_IMAGES = (1, 100, 1), (1.0, 20.0, 0.1), (1, 4, 1)  # least, most, step


@dataclass(frozen=True)
class Drawing:
    """What to draw, under the names of run_sd.py's arguments."""

    prompts: list[str]
    negative_prompt: str
    steps: int
    guidance_scale: float
    num_images: int
    seed: int


class Drawn(NamedTuple):
    image: Image.Image
    about: dict[str, Any]


class LoadedPainter(NamedTuple):
    pipe: StableDiffusionPipeline
    args: argparse.Namespace  # with what loading found out, such as the size of pictures
    flags: dict[str, Any]


class DrawingModel:
    """A model of Stable Diffusion in a folder.

    Args:
        chosen: `model_path`, None for the demo's in `folder`, and the arguments of device and acceleration.

    Attributes:
        args: what a drawing takes where nobody chooses.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(self, chosen: dict[str, Any], folder: Path, manager: DeviceManager, report: Report) -> None:
        self.is_demo = chosen["model_path"] is None
        path = ["--model_path", str(chosen["model_path"])] if chosen["model_path"] else []
        self.manager, self.report = manager, report
        # What run_sd.py takes without arguments; each drawing of the page brings a prompt of its own.
        defaults = vars(parse_arguments(None, folder, [*path, "--prompt", "-"]))
        self.args = argparse.Namespace(**(defaults | chosen | {"model_path": defaults["model_path"]}))
        self.model = check_model(self.args.model_path, None)

    @property
    def name(self) -> str:
        return f"Stable Diffusion ({self.args.model_path.name})"

    def load(self) -> LoadedPainter:
        """The pipeline, placed and accelerated. Raises UserError."""
        args = argparse.Namespace(**vars(self.args))
        args.num_images, args.guidance_scale = NUM_IMAGES[1], max(args.guidance_scale, 2.0)  # memory for the most
        scheduler = check_before_loading(args, self.model, self.manager.device, self.report)
        pipe = make_pipeline(args, self.model, scheduler, self.manager, args.dtype, self.report)
        pipe.set_progress_bar_config(disable=True)
        return LoadedPainter(pipe, args, accelerate(pipe, args, self.report))

    def draw(self, loaded: LoadedPainter, drawing: Drawing, on_step: OnStep) -> tuple[list[Drawn], list[str]]:
        """The pictures of `drawing`, made in one call of the pipeline, and warnings of what is wrong with them.

        Raises:
            UserError: a setting would have no effect.
        """
        args = argparse.Namespace(**(vars(loaded.args) | asdict(drawing)))
        if args.negative_prompt and args.guidance_scale <= 1:
            raise UserError("a negative prompt has no effect without guidance: take more than 1, or leave it out")
        report = Report()
        warn_of_long_prompts(loaded.pipe, args, [*args.prompts, args.negative_prompt], report)
        try:
            call = call_pipeline(loaded.pipe, args, self.manager, 0, args.cache, on_step=on_step)
        except BaseException:
            loaded.pipe.maybe_free_model_hooks()  # as after its last step
            raise
        about = {
            "prompt": drawing.prompts[0],
            "settings": settings_in_use(args, loaded.pipe) | {"model_path": args.model_path.name},
            "device": {**get_device_info(self.manager.device), "dtype": str(args.dtype)},
            "flags": loaded.flags,
            "versions": versions(),
        }
        drawn = [
            Drawn(image, about | {"seed": seed}) for image, seed in zip(call.images, seeds_of(args, 0), strict=True)
        ]
        return drawn, [*report.warnings, *call.warnings]
