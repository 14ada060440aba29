"""Quality against cost of --fast, of the packages that it is measured against, and of fewer steps.

    python scripts/schedules/compare.py                                      the demo model, 32 held-out prompts
    python scripts/schedules/compare.py --num_prompts 200 --scheduler ddim   more of them, and another scheduler
    python scripts/schedules/compare.py --model_path DIR --prompts FILE      another model

Every way draws the same pictures. PSNR and SSIM are to the picture of all steps, in the mean and in the worst tenth;
of the demo model's scenes it is also seen by image analysis whether the right shapes are there. The cost is the share
of the arithmetic of all steps in the UNet of Stable Diffusion 2.1, 512 x 512, whatever model draws; times are measured
by scripts/benchmarks/benchmark.py --model sd2.1-base. Where a file beside the model has steps for --fast, there are
rows for the steps by guidance, too, which the plot leaves out. Writes compare.json and compare.png to --output_dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from skimage.metrics import structural_similarity

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cache_options import FAST, count_steps, fast_options
from runners.cli import ArgumentParser, UserError, file_path, one_line_errors
from runners.files import make_output_dir
from runners.report import Report, format_table
from runners.schedule_file import schedule_beside
from runners.schedulers import SCHEDULERS, check_steps, make_scheduler
from scripts.benchmarks.benchmark import SD21_BASE_UNET
from scripts.demo_model.scenes import held_out_scenes, score_image
from scripts.schedules.costs import Costs
from scripts.schedules.drawing import RATIO, Drawing, Method, distance, draw, worst_tenth
from scripts.schedules.inputs import add_arguments, load, read_prompts_of
from scripts.schedules.panels import plot_panels

ALL_STEPS = "all steps"
BY_GUIDANCE = "by guidance"  # where a file beside the model has other steps
INTERVALS = (2, 3, 4, 5, 8)
FEWER_STEPS = (8, 10, 12, 15, 20, 25, 30, 40)
SOLVERS = ("ddim", "dpm++", "unipc")
COLUMNS = {
    "share": "share",
    "psnr": "PSNR",
    "psnr_worst_tenth": "worst tenth",
    "ssim": "SSIM",
    "ssim_worst_tenth": "worst tenth",
    "right": "right %",
}
LATENTS = 64  # of each side, for 512 x 512 pixels


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, num_prompts="", seed=1000)
    parser.add_argument("--scheduler", choices=SCHEDULERS, metavar="NAME", help="(the model's)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="ways to draw, by their names in the table, as 'fast*' 'tomesd + DeepCache 3' (all)",
    )
    folder = Path("outputs/compare")
    parser.add_argument("--output_dir", type=file_path, default=folder, metavar="DIR", help=f"({folder})")
    return parser.parse_args(arguments)


def methods(args: argparse.Namespace, scheduler: str, guidance_scale: float) -> dict[str, Method]:
    """By their names. `scheduler` is the class's."""
    found: dict[str, Method] = {}
    for row in FAST:
        own = schedule_beside(args.model_path, row, scheduler, args.steps, guidance_scale)
        by_guidance = Method(fast_options(row, guidance_scale))
        found |= {f"fast {row}": Method(own.options()) if own else by_guidance}
        found |= {f"fast {row}, {BY_GUIDANCE}": by_guidance} if own else {}
    for interval in INTERVALS:
        found[f"DeepCache {interval}"] = Method({"cache_interval": interval})
        found[f"tomesd + DeepCache {interval}"] = Method({"cache_interval": interval}, ratio=RATIO)
    for solver in SOLVERS:
        found |= {f"{solver} {n} steps": Method(steps=n, scheduler=solver) for n in FEWER_STEPS if n < args.steps}
    chosen = {name: way for name, way in found.items() if any(fnmatch(name, pattern) for pattern in args.only)}
    if not chosen:
        raise UserError(f"--only {' '.join(map(repr, args.only))}: there are {', '.join(map(repr, found))}")
    return {ALL_STEPS: Method(), **chosen}


def measure(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, prompts: list[str], guidance_scale: float
) -> dict[str, Any]:
    """For each method its distances, share and, of the demo model's scenes, the share of right pictures."""
    drawing = Drawing(prompts, args.seed, args.steps, guidance_scale, args.batch_size)
    scenes = None if args.prompts else held_out_scenes(args.num_prompts, args.seed)
    costs = Costs(SD21_BASE_UNET, LATENTS, guidance_scale > 1)
    results: dict[str, Any] = {}
    reference = None
    ways = methods(args, type(pipe.scheduler).__name__, guidance_scale)
    steps = {  # of all ways, before any is drawn
        name: count_steps(pipe.scheduler, method.steps or args.steps, method.options) for name, method in ways.items()
    }
    for name, method in ways.items():
        pictures = draw(pipe, drawing, method, f"guidance {guidance_scale:g}, {name}")
        reference = pictures if reference is None else reference
        found = distance(pictures, reference)
        pairs = zip(pictures, reference, strict=True)
        ssim = [structural_similarity(*pair, data_range=1, channel_axis=2) for pair in pairs]
        results[name] = {
            **steps[name],
            "share": costs.share(pipe, args.steps, method),
            "psnr": found.psnr,
            "psnr_worst_tenth": found.worst_tenth,
            "ssim": float(np.mean(ssim)),
            "ssim_worst_tenth": worst_tenth(np.array(ssim)),
        }
        if scenes:
            levels = (pictures * 255).round().astype(np.uint8)
            right = [score_image(picture, scene).all for picture, scene in zip(levels, scenes, strict=True)]
            results[name]["right"] = 100 * float(np.mean(right))
    return results


def table(found: dict[str, dict[str, Any]]) -> str:
    columns = {name: text for name, text in COLUMNS.items() if name in found[ALL_STEPS]}
    rows = [(way, [row[name] for name in columns], ".3f") for way, row in found.items()]
    return format_table([*columns.values()], rows)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """PSNR against the share of the arithmetic, with lines for the ways that differ in one number."""
    panels = {
        guidance_scale: {
            line: [
                (row["share"], row["psnr"])
                for way, row in found.items()
                if way.startswith(line.lstrip("-")) and BY_GUIDANCE not in way
            ]
            for line in ("--fast", "DeepCache", "tomesd + DeepCache", *SOLVERS)
        }
        for guidance_scale, found in results.items()
    }
    drawn = {scale: {line: points for line, points in lines.items() if points} for scale, lines in panels.items()}
    plot_panels(drawn, "share of the arithmetic of all steps", title, path)


def run(args: argparse.Namespace) -> None:
    report = Report()
    prompts = read_prompts_of(args)
    output_dir = make_output_dir(args.output_dir)
    pipe = load(args, report)
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler, like=pipe.scheduler)
    check_steps(pipe.scheduler, args.steps)
    results: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for guidance_scale in args.guidance_scales:
            found = results[f"{guidance_scale:g}"] = measure(pipe, args, prompts, guidance_scale)
            print(f"guidance {guidance_scale:g}, {type(pipe.scheduler).__name__}, {args.num_prompts} pictures")
            print(table(found), flush=True)
    report.sections = {
        "settings": {**vars(args), "device": str(pipe.device), "dtype": str(pipe.dtype)},
        "results": results,
    }
    report.write(output_dir / "compare.json")
    title = f"{args.model_path.name}, {type(pipe.scheduler).__name__}, {args.steps} steps"
    plot(results, title, output_dir / "compare.png")
    print(f"compare.json and compare.png are in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
