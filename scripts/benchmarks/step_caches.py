"""What step caches save and what they change: edits of the demo model with each setting, beside those without.

    python scripts/benchmarks/step_caches.py
    python scripts/benchmarks/step_caches.py --num_edits 200 --step_caches first_block:0.05 taylorseer:2

Prints for each setting the share of block evaluations that were computed, the time beside that without a cache
(settings take turns, and the median of the ratios counts), the median PSNR of results beside those without a cache,
and how many of the held-out edits are right by image analysis.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers import HiDreamImageEditingPipeline, HiDreamImageTransformer2DModel
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from processors import disable_step_cache, enable_step_cache
from processors.step_cache import computed_blocks
from runners.cli import one_line_errors
from runners.devices import choose_device, choose_dtype
from runners.hidream.arguments import step_cache
from runners.images import similarity
from runners.model_dir import require_patched_diffusers
from runners.report import Report, format_table
from scripts.demo_hidream.edits import held_out_edits, score_edit
from scripts.demo_hidream.evaluate import REFINER, add_arguments, complete, make_edits

SETTINGS = (
    *("first_block:0.05", "first_block:0.1", "first_block:0.2", "first_block:0.4"),
    *("taylorseer:2", "taylorseer:3", "taylorseer:4", "taylorseer:6"),
)
NONE = "no cache"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = add_arguments("step_caches.py", __doc__)
    parser.set_defaults(num_edits=60)
    add = parser.add_argument_group("what to compare").add_argument
    add("--step_caches", nargs="+", default=SETTINGS, metavar="NAME:VALUE", help=f"({' '.join(SETTINGS)})")
    add("--refine_strength", type=float, default=0.3, metavar="R", help="(0.3)")
    return complete(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    settings = {NONE: None} | {name: step_cache(name) for name in args.step_caches}
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    pipe = HiDreamImageEditingPipeline.from_pretrained(args.model_path, dtype=dtype).to(manager.device)
    refiner = HiDreamImageTransformer2DModel.from_pretrained(args.model_path / REFINER, dtype=dtype).to(manager.device)
    pipe.set_progress_bar_config(disable=True)
    edits = held_out_edits(args.num_edits, args.seed)
    models = [pipe.transformer, refiner]

    pictures: dict[str, list[np.ndarray]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    computed: dict[str, int] = defaultdict(int)
    for first in range(0, len(edits), args.batch_size):
        batch = argparse.Namespace(**vars(args) | {"seed": args.seed + first})
        for name, cache in settings.items():
            if cache:
                for model in models:
                    enable_step_cache(model, *cache)
            start = time.perf_counter()
            made = make_edits(
                pipe,
                edits[first : first + args.batch_size],
                batch,
                name,
                refiner=refiner,
                refine_strength=args.refine_strength,
            )
            seconds[name].append(time.perf_counter() - start)
            pictures[name].extend(made)
            for model in models if cache else ():
                computed[name] += sum(computed_blocks(model))
                disable_step_cache(model)

    blocks = len(pipe.transformer.double_stream_blocks) + len(pipe.transformer.single_stream_blocks)
    whole = len(seconds[NONE]) * args.steps * blocks
    rows = []
    for name, results in pictures.items():
        right = sum(score_edit(picture, edit).all for picture, edit in zip(results, edits, strict=True))
        share, noise = 100.0, None
        if name != NONE:
            share = 100 * computed[name] / whole
            alike = [
                similarity(*map(Image.fromarray, pair)).psnr for pair in zip(results, pictures[NONE], strict=True)
            ]
            noise = statistics.median(float("inf") if psnr is None else psnr for psnr in alike)
        ratio = statistics.median(mine / plain for mine, plain in zip(seconds[name], seconds[NONE], strict=True))
        rows.append((name, [share, ratio, noise, right], ".4g"))
    print(format_table(["blocks %", "time", "PSNR dB", f"right of {len(edits)}"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
