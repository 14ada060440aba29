"""Scores an adapter that learnt stars: what it draws of them, and what is left of all that the demo model could draw.

    python scripts/demo_lora/evaluate.py --lora outputs/star_adapter/pytorch_lora_weights.safetensors

Draws held-out stars and the demo model's own held-out prompts, without the adapter and with it, and looks at colour,
shape and position by image analysis. Writes scores.json and a sheet of pictures of each to --output_dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, file_path, finite_float, non_negative_int, one_line_errors, positive_int
from runners.devices import add_device_arguments, choose_device, choose_dtype
from runners.files import make_output_dir
from runners.model_dir import guidance_scale_of, load_pipeline, require_patched_diffusers
from runners.report import Report, format_table
from runners.stable_diffusion.adapters import check_loras, fuse_loras
from runners.stable_diffusion.arguments import lora
from scripts.demo_lora.stars import STAR, choose_scenes
from scripts.demo_model.evaluate import ASPECTS, SHEET_PICTURES, draw, percentages
from scripts.demo_model.scenes import SHAPES, held_out_scenes, score_image
from scripts.demo_model.training import save_grid


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    demo = ROOT / "examples/sd2.1/demo_model"
    add("--lora", type=lora, required=True, metavar="FILE[:SCALE]", help="the adapter")
    add("--model_path", type=file_path, default=demo, metavar="DIR", help="(the demo model)")
    add("--pictures", type=positive_int, default=100, metavar="N", help="that the adapter learnt from (100)")
    add("--stars", type=positive_int, default=40, metavar="N", help="held-out prompts of each kind with a star (40)")
    add("--others", type=positive_int, default=200, metavar="N", help="held-out prompts of the demo model's own (200)")
    add("--steps", type=positive_int, default=50, metavar="N", help="denoising steps (50)")
    add("--guidance_scale", type=finite_float, metavar="G", help="(the model's, as in run_sd.py)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of scenes and pictures (0)")
    add("--batch_size", type=positive_int, default=20, metavar="N", help="pictures made together (20)")
    add_device_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    folder = Path("outputs/evaluate_lora")
    add("--output_dir", type=file_path, default=folder, metavar="DIR", help=f"({folder})")
    args = parser.parse_args(arguments)
    if args.guidance_scale is None:
        args.guidance_scale = guidance_scale_of(args.model_path)
    return args


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    check_loras([args.lora])
    report, output_dir = Report(), make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    _, held_out = choose_scenes(args.pictures, args.seed)
    kinds = {kind: scenes[: args.stars] for kind, scenes in held_out.items()}
    kinds["the model's own"] = held_out_scenes(args.others, args.seed)
    rows, scores = [], {}
    for name, loras in (("without", []), ("with", [args.lora])):
        pipe = load_pipeline(StableDiffusionPipeline, args.model_path, dtype)
        fuse_loras(pipe, loras)
        pipe.to(manager.device)
        pipe.set_progress_bar_config(disable=True)
        for kind, scenes in kinds.items():
            label = f"{kind}, {name} the adapter"
            pictures = draw(pipe, scenes, args, {}, label)
            found = [
                score_image(picture, scene, (*SHAPES, STAR)) for picture, scene in zip(pictures, scenes, strict=True)
            ]
            scores[label] = percentages(found)
            rows.append((label, [*scores[label].values()], ".1f"))
            save_grid(pictures[:SHEET_PICTURES], output_dir / f"{kind.replace(' ', '_')}_{name}.png")
    report.sections = {"settings": {name: str(value) for name, value in vars(args).items()}, "scores": scores}
    report.write(output_dir / "scores.json")
    print(format_table([f"{aspect} %" for aspect in ASPECTS], rows))
    print(f"scores.json and a sheet of pictures of each are in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
