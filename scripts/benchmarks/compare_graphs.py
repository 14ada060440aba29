"""Compare the pictures that graphs draw with those of the same flags without graphs, over sizes and seeds.

    python scripts/benchmarks/compare_graphs.py
    python -m emulator run --soc Ascend310P3 -- python scripts/benchmarks/compare_graphs.py

Graphs round in another order than eager kernels. What computes continuously keeps that difference small; token merging
chooses tokens by comparing similarities, so that two that are nearly equal may change places, and the picture with
them. Prints the median and the worst PSNR for each set of flags and writes graphs.json to --output_dir.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.graphs.compile import compile_pipeline
from runners.cli import ArgumentParser, file_path, image_size, non_negative_int, one_line_errors, positive_int
from runners.devices import add_device_arguments, check_compiler, choose_device, choose_dtype
from runners.files import make_output_dir, write_json
from runners.images import similarity
from runners.model_dir import guidance_scale_of, load_pipeline, require_patched_diffusers
from runners.report import Report, format_table
from scripts.demo_model.evaluate import accelerate

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "FA": ("FA",),
    "DC": ("DC",),
    "FA + DC": ("FA", "DC"),
    "TOME": ("TOME",),
    "FA + TOME + DC": ("FA", "TOME", "DC"),
}
PROMPT = "a large red circle in the centre, white background"
EQUAL = float("inf")  # the PSNR of equal pictures


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="compare_graphs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    demo = ROOT / "examples/sd2.1/demo_model"
    add("--model_path", type=file_path, default=demo, metavar="DIR", help="a pipeline's directory (the demo model)")
    add("--configs", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME", help="(all)")
    add("--sizes", nargs="+", type=image_size, default=[96, 128, 160], metavar="PIXELS", help="(96 128 160)")
    add("--seeds", nargs="+", type=non_negative_int, default=[0, 1, 2, 3], metavar="N", help="(0 1 2 3)")
    add("--steps", type=positive_int, default=20, metavar="N", help="(20)")
    add_device_arguments(parser)
    add("--output_dir", type=file_path, default=Path("outputs/graphs"), metavar="DIR", help="(outputs/graphs)")
    return parser.parse_args(arguments)


def draw(pipe: StableDiffusionPipeline, args: argparse.Namespace, options: dict[str, Any]) -> list[Image.Image]:
    """A picture of each size and seed."""
    return [
        pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=args.steps,
            guidance_scale=guidance_scale_of(args.model_path),
            generator=torch.Generator().manual_seed(seed),
            **options,
        ).images[0]
        for size in args.sizes
        for seed in args.seeds
    ]


def compare(pipe: StableDiffusionPipeline, flags: Sequence[str], args: argparse.Namespace) -> list[float]:
    """The PSNR, in dB, of each picture of the graphs over that without graphs; `pipe` stays compiled."""
    options = accelerate(pipe, flags)
    eager = draw(pipe, args, options)
    compile_pipeline(pipe)
    graphs = draw(pipe, args, options)
    alike = [similarity(image, reference).psnr for image, reference in zip(graphs, eager, strict=True)]
    return [EQUAL if psnr is None else psnr for psnr in alike]


def run(args: argparse.Namespace, manager: DeviceManager, dtype: torch.dtype) -> None:
    check_compiler(manager.device)
    psnrs = {}
    for name in tqdm(args.configs):
        pipe = load_pipeline(StableDiffusionPipeline, args.model_path, dtype).to(manager.device)
        pipe.set_progress_bar_config(disable=True)
        psnrs[name] = compare(pipe, CONFIGURATIONS[name], args)
    rows = [(name, [statistics.median(psnr), min(psnr)], ".1f") for name, psnr in psnrs.items()]
    print(format_table([f"median dB of {len(args.sizes) * len(args.seeds)} pictures", "worst dB"], rows))
    settings = {"sizes": args.sizes, "seeds": args.seeds, "steps": args.steps, "dtype": str(dtype)}
    texts = {name: [None if psnr == EQUAL else psnr for psnr in psnrs[name]] for name in psnrs}
    write_json(args.output_dir / "graphs.json", {**settings, "device": str(manager.device), "psnr": texts})


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = parse_arguments(arguments)
        require_patched_diffusers()
        report = Report()
        args.output_dir = make_output_dir(args.output_dir)
        manager = choose_device(args, report)
        run(args, manager, choose_dtype(args, manager, report))


if __name__ == "__main__":
    main()
