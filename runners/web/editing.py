"""HiDream-E1 as the page uses it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from diffusers.pipelines.hidream_image.editing_images import E1_1_SIDE, E1_FULL_SIDE, to_rgb

from ascend.device import DeviceManager, get_device_info
from runners.cli import UserError
from runners.hidream.arguments import E1_1, E1_FULL, REFINER, Family, parse_arguments
from runners.hidream.editing import accelerate, describe, edit_picture
from runners.hidream.edits import Edit, open_picture
from runners.hidream.model import Editor, complete, load_editor
from runners.report import Report, versions
from runners.web.worker import OnStep

FAMILIES = {"e1.1": E1_1, "e1-full": E1_FULL}
SIDES = {E1_1.size_policy: E1_1_SIDE, E1_FULL.size_policy: E1_FULL_SIDE}  # of the largest picture


@dataclass(frozen=True)
class Ranges:
    """What the original's page lets people choose, (least, most, step); see `gradio_demo_1_1.py`, `gradio_demo.py`."""

    guidance_scale: tuple[float, float, float]
    image_guidance_scale: tuple[float, float, float]
    steps: tuple[int, int, int]
    refine_strength: tuple[float, float, float]
    seed: tuple[int, int | None]


RANGES = {
    "e1.1": Ranges((1, 20, 0.1), (1, 10, 0.1), (10, 50, 1), (0, 1, 0.05), (0, None)),
    "e1-full": Ranges((1, 10, 0.1), (1, 10, 0.1), (10, 50, 1), (0, 1, 0.1), (0, 10_000)),
}


@dataclass(frozen=True)
class Settings:
    """Of one edit, under the names of the command line's arguments."""

    negative_prompt: str
    steps: int
    guidance_scale: float
    image_guidance_scale: float
    refine_strength: float
    clip_cfg_norm: bool


@dataclass(frozen=True)
class Edited:
    """A result as large as `source`, the picture upright and in RGB; `about` says how it was made."""

    source: PIL.Image.Image
    image: PIL.Image.Image
    about: dict[str, Any]
    warning: str | None


class EditingModel:
    """A model of HiDream-E1 in a folder.

    Args:
        key: of `FAMILIES`.
        chosen: `model_path`, None for the demo's in `folder`, `edit_lora`, `refiner_path`, `llama_path` and the
            arguments of device and acceleration.

    Attributes:
        args: what an edit takes where nobody chooses.
        is_demo: whether it is the one of this repository.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(self, key: str, chosen: dict[str, Any], folder: Path, manager: DeviceManager, report: Report) -> None:
        self.family: Family = FAMILIES[key]
        self.key, self.ranges = key, RANGES[key]
        self.manager, self.report = manager, report
        # What the runners take without arguments; each edit of the page brings picture and instruction of its own.
        defaults = parse_arguments("", None, self.family, folder, ["--image", "-", "--instruction", "-"])
        self.is_demo = chosen["model_path"] is None
        if self.is_demo:
            chosen = chosen | {"model_path": defaults.model_path, "refiner_path": None, "llama_path": None}
        self.args = args = argparse.Namespace(**(vars(defaults) | chosen))
        if args.refiner_path is None and not args.edit_lora and not (args.model_path / REFINER).is_dir():
            args.refine_strength = 0.0
        complete(self.args, self.family)

    @property
    def name(self) -> str:
        return f"{self.family.name} ({self.args.model_path.name})"

    @property
    def refines(self) -> bool:
        return self.args.refine_strength > 0

    def load(self) -> tuple[Editor, dict[str, Any]]:
        """What edits, and which flags did what. Raises UserError."""
        side = self.args.side or SIDES[self.family.size_policy]
        args = argparse.Namespace(**vars(self.args))
        args.guidance_scale = max(args.guidance_scale, 2.0)  # memory for all branches, whatever is chosen later
        editor = load_editor(args, self.family, self.manager, args.dtype, (side, side), self.report)
        editor.pipe.set_progress_bar_config(disable=True)
        return editor, accelerate(editor, args, self.manager.device)

    def edit(self, loaded: tuple[Editor, dict[str, Any]], edit: Edit, settings: Settings, on_step: OnStep) -> Edited:
        """Make `edit`, and call `on_step` after each step.

        Raises:
            UserError: the picture cannot be read or is of a shape that the model does not take.
        """
        editor, flags = loaded
        args = argparse.Namespace(**(vars(self.args) | asdict(settings)))
        try:
            source = open_picture(edit.image)
        except UserError as error:  # people know the name, and where the server keeps the file is not for them
            raise UserError(str(error).replace(str(edit.image), edit.image.name)) from error

        def on_step_end(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipe.num_timesteps)
            return {}

        try:
            result = edit_picture(edit, source, editor, args, self.family, self.manager, on_step_end)
        except BaseException as error:
            editor.pipe.maybe_free_model_hooks()  # as after its last step
            if isinstance(error, ValueError):
                raise UserError(f"{edit.image.name}: {error}") from error
            raise
        about = describe(edit, args, source, result.processed)
        if args.edit_lora:
            about["edit_lora"] = {args.edit_lora.path.name: args.edit_lora.scale}
        about |= {
            "input_image": edit.image.name,  # not where the server keeps files, here and above
            "family": self.family.name,
            "device": {**get_device_info(self.manager.device), "dtype": str(args.dtype)},
            "flags": flags,
            "versions": versions(),
        }
        return Edited(to_rgb(source), result.image, about, result.warning)
