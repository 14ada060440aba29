"""Score the demo model: draw held-out prompts and see by image analysis whether colour, shape and position are right.

    python scripts/demo_model/evaluate.py
    python scripts/demo_model/evaluate.py --configs none DC all --num_prompts 50
    python scripts/demo_model/evaluate.py --configs none int8          weights of 8 bits
    python scripts/demo_model/evaluate.py --judge clip                 by the demo CLIP, too, and where they agree

Prints a line for each configuration and writes scores.json and a sheet of pictures of each to --output_dir.
Training never saw the scenes that the prompts describe.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.graphs.compile import compile_pipeline
from processors import enable_flash_attention, enable_token_merging, quantize_weights
from runners.cache_options import DEFAULT_INTERVAL
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    non_negative_int,
    one_line_errors,
    positive_int,
    text,
)
from runners.clip import CLIPInferenceService
from runners.devices import add_device_arguments, check_compiler, choose_device, choose_dtype
from runners.files import make_output_dir
from runners.model_dir import guidance_scale_of, load_pipeline, require_patched_diffusers
from runners.report import Report, format_table
from scripts.demo_clip.judge import agreement, judge
from scripts.demo_clip.train import DEMO_CLIP
from scripts.demo_model.scenes import MAX_HELD_OUT, Scene, Score, held_out_scenes, score_image
from scripts.demo_model.training import save_grid

FLAGS = ("FA", "TOME", "DC", "dynamo")
EAGER = "FA+TOME+DC"
INT8 = "int8"  # saves memory, not time
CONFIGURATIONS = {
    "none": (),
    **{flag: (flag,) for flag in FLAGS},
    EAGER: ("FA", "TOME", "DC"),
    INT8: (INT8,),
    "all": FLAGS,
}
ASPECTS = ("colour", "shape", "position", "all")
SHEET_PICTURES = 64


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "--model_path",
        type=file_path,
        default=ROOT / "examples/sd2.1/demo_model",
        metavar="DIR",
        help="(the demo model)",
    )
    add("--num_prompts", type=positive_int, default=200, metavar="N", help="held-out prompts (200)")
    add("--steps", type=positive_int, default=50, metavar="N", help="denoising steps (50)")
    add("--guidance_scale", type=finite_float, metavar="G", help="(the model's, as in run_sd.py)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of the first picture, the next has N+1 ... (0)")
    add("--batch_size", type=positive_int, default=20, metavar="N", help="pictures made together (20)")
    add(
        "--configs",
        nargs="+",
        choices=CONFIGURATIONS,
        default=[name for name in CONFIGURATIONS if name not in (EAGER, INT8)],
        metavar="NAME",
        help=f"accelerations to score, of {', '.join(CONFIGURATIONS)} (none, each flag, all)",
    )
    add("--judge", choices=("analysis", "clip"), default="analysis", help="clip asks a CLIP, too (analysis)")
    add("--clip_model", type=text, default=str(DEMO_CLIP), metavar="DIR", help="of --judge clip (the demo CLIP)")
    add_device_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=file_path,
        default=Path("outputs/evaluate"),
        metavar="DIR",
        help="(outputs/evaluate)",
    )
    args = parser.parse_args(arguments)
    if args.guidance_scale is None:
        args.guidance_scale = guidance_scale_of(args.model_path)
    return args


def accelerate(pipe: StableDiffusionPipeline, flags: Sequence[str]) -> dict[str, Any]:
    """Switch `flags` on in `pipe`. Returns the arguments that its calls need beside."""
    if INT8 in flags:
        quantize_weights(pipe)
    if "FA" in flags:
        enable_flash_attention(pipe)
    if "TOME" in flags:
        enable_token_merging(pipe, ratio=0.5)
    if "dynamo" in flags:
        compile_pipeline(pipe)
    return {"cache_interval": DEFAULT_INTERVAL} if "DC" in flags else {}


def draw(
    pipe: StableDiffusionPipeline,
    scenes: Sequence[Scene],
    args: argparse.Namespace,
    options: dict[str, Any],
    name: str,
) -> np.ndarray:
    """A picture of every scene, uint8 [count, height, width, 3]. Each has its own seed, whatever the batch size."""
    pictures = []
    for start in tqdm(range(0, len(scenes), args.batch_size), desc=name, unit="batch"):
        batch = scenes[start : start + args.batch_size]
        drawn = pipe(
            [scene.caption() for scene in batch],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + number) for number in range(len(batch))],
            output_type="np",
            **options,
        ).images
        pictures.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def percentages(scores: Sequence[Score]) -> dict[str, float]:
    return {aspect: 100 * float(np.mean([getattr(score, aspect) for score in scores])) for aspect in ASPECTS}


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    if any("dynamo" in CONFIGURATIONS[name] for name in args.configs):
        check_compiler(manager.device)
    if args.num_prompts > MAX_HELD_OUT:
        raise UserError(f"--num_prompts {args.num_prompts}: there are {MAX_HELD_OUT} held-out prompts")
    scenes = held_out_scenes(args.num_prompts, args.seed)

    service = CLIPInferenceService(args.clip_model, str(manager.device)) if args.judge == "clip" else None
    rows: list[tuple[str, Sequence[float | None], str]] = []
    report.sections = {"settings": {**vars(args), "model_path": str(args.model_path)}, "scores": {}, "pictures": {}}
    for name in args.configs:
        pipe = load_pipeline(StableDiffusionPipeline, args.model_path, dtype).to(manager.device)
        pipe.set_progress_bar_config(disable=True)
        options = accelerate(pipe, CONFIGURATIONS[name])
        start = time.perf_counter()
        pictures = draw(pipe, scenes, args, options, name)
        seconds = time.perf_counter() - start
        scores = [score_image(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        shares = percentages(scores)
        rows.append((name, [*shares.values(), seconds], ".1f"))
        report.sections["scores"][name] = {**shares, "seconds": seconds}
        report.sections["pictures"][name] = [
            {"prompt": scene.caption(), **asdict(score)} for scene, score in zip(scenes, scores, strict=True)
        ]
        if service:
            verdicts = [judge(service, picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
            agreed = agreement(scores, verdicts)
            rows.append((f"{name}, by CLIP", [*percentages(verdicts).values(), None], ".1f"))
            rows.append((f"{name}, they agree", [*agreed.values(), None], ".1f"))
            report.sections["scores"][name] |= {"clip": percentages(verdicts), "agreement": agreed}
        save_grid(pictures[:SHEET_PICTURES], output_dir / f"{name}.png")
    report.sections["settings"].pop("output_dir")
    report.write(output_dir / "scores.json")
    print(format_table(["colour %", "shape %", "position %", "all right %", "seconds"], rows))
    print(f"scores.json and a sheet of pictures of each configuration are in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
