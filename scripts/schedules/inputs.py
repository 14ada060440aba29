"""What the tools beside this draw with: a model, prompts for it, a scheduler and a device."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from diffusers import StableDiffusionPipeline

from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    non_negative_int,
    positive_int,
    read_prompts,
)
from runners.devices import add_device_arguments, choose_device, choose_dtype
from runners.model_dir import load_pipeline, require_patched_diffusers
from runners.report import Report
from scripts.demo_model.scenes import held_out_scenes

DEMO_MODEL = Path(__file__).resolve().parents[2] / "examples/sd2.1/demo_model"


def add_arguments(parser: ArgumentParser, num_prompts: str, seed: int) -> None:
    """`num_prompts` says what the prompts are for; `seed` is the default of the first picture's."""
    add = parser.add_argument_group("what to draw").add_argument
    add("--model_path", type=file_path, default=DEMO_MODEL, metavar="DIR", help="(the demo model)")
    add(
        "--prompts",
        type=file_path,
        metavar="FILE",
        help="UTF-8 text, a prompt on each line, begun again after the last (the demo model's scenes)",
    )
    add("--num_prompts", type=positive_int, default=32, metavar="N", help=f"{num_prompts}(32)")
    add("--steps", type=positive_int, default=50, metavar="N", help="(50)")
    add("--guidance_scales", type=finite_float, nargs="+", default=[1.5, 4.0, 7.5], metavar="G", help="(1.5 4 7.5)")
    add("--seed", type=non_negative_int, default=seed, metavar="N", help=f"of the first picture ({seed})")
    add("--batch_size", type=positive_int, default=16, metavar="N", help="pictures made together (16)")
    add_device_arguments(parser)


def read_prompts_of(args: argparse.Namespace) -> list[str]:
    """As many as --num_prompts says. Raises UserError: there are none for the model."""
    if args.prompts is None:
        if args.model_path.resolve() != DEMO_MODEL:
            raise UserError("--model_path needs --prompts, which the model was trained for")
        return [scene.caption() for scene in held_out_scenes(args.num_prompts, args.seed)]
    return list(itertools.islice(itertools.cycle(read_prompts(args.prompts)), args.num_prompts))


def load(args: argparse.Namespace, report: Report) -> StableDiffusionPipeline:
    """The pipeline on its device."""
    require_patched_diffusers()
    manager = choose_device(args, report)
    pipe = load_pipeline(StableDiffusionPipeline, args.model_path, choose_dtype(args, manager, report))
    pipe.to(manager.device).set_progress_bar_config(disable=True)
    return pipe
