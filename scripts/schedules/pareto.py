"""Quality against time: what compare.py and benchmark.py measured, in one picture.

    python scripts/schedules/compare.py --scheduler ddim
    python scripts/benchmarks/benchmark.py --model sd2.1-base --steps 50 --guidance_scale 1.5 4 7.5 \\
        --schedule examples/sd2.1/demo_model/schedules.json --interval 2 3 5 8 --fewer_steps 10 20 \\
        --configs DeepCache "tomesd + DeepCache" DDIM "DPM++ 2M" UniPC "fast balanced + dynamo"
    python scripts/schedules/pareto.py --quality outputs/compare/compare.json --times outputs/benchmark/benchmark.json

A panel for each guidance scale: PSNR to the picture of all steps, over the time of the denoising loop, which is 1
without acceleration, for each way to draw that both files have. Both must have run as many steps of each kind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cache_options import FAST
from runners.cli import ArgumentParser, UserError, file_path, is_finite_number, one_line_errors
from runners.files import make_output_dir
from runners.model_dir import read_json
from runners.report import format_table
from scripts.benchmarks.benchmark import BASELINE, SOLVERS
from scripts.schedules.panels import plot_panels

# What benchmark.py calls a configuration, and what compare.py calls the same way to draw.
NAMES = {
    "DeepCache": "DeepCache {interval}",
    "tomesd + DeepCache": "tomesd + DeepCache {interval}",
    "all": "tomesd + DeepCache {interval}",  # tests/processors and tests/fork show that ours draw the same
    **{config: f"{solver} {{fewer_steps}} steps" for config, solver in SOLVERS.items()},
    **{f"fast {row} + dynamo": f"fast {row}" for row in FAST},
}
LABELS = {"all": "--FA --TOME --DC --dynamo"} | {f"fast {row} + dynamo": "--FA --fast --dynamo" for row in FAST}
KINDS = ("full_steps", "shallow_steps")


class Point(NamedTuple):
    config: str
    name: str
    time: float  # of the denoising loop, as a share of that without acceleration
    psnr: float
    psnr_worst_tenth: float


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="pareto.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quality", type=file_path, required=True, metavar="FILE", help="compare.json")
    add("--times", type=file_path, required=True, metavar="FILE", help="benchmark.json")
    add("--output", type=file_path, default=Path("outputs/pareto.png"), metavar="FILE", help="(outputs/pareto.png)")
    return parser.parse_args(arguments)


def join(quality: dict[str, Any], times: dict[str, Any]) -> dict[str, list[Point]]:
    """By guidance scale. Raises UserError: the files are of other steps, or have nothing in common."""
    panels: dict[str, list[Point]] = {}
    baseline = times["results"][BASELINE]["seconds"]
    for scale, drawn in quality["results"].items():
        points = panels[scale] = []
        for row in times["results"].values():
            name = NAMES.get(row["config"], "").format(**row)
            if name not in drawn or row.get("guidance_scale", float(scale)) != float(scale):
                continue
            found = drawn[name]
            if [row[kind] for kind in KINDS] != [found[kind] for kind in KINDS]:
                raise UserError(
                    f"{name}, guidance {scale}: --times has {row[KINDS[0]]} full and {row[KINDS[1]]} shallow steps, "
                    f"--quality {found[KINDS[0]]} and {found[KINDS[1]]}; give both the same --steps and schedules"
                )
            share = statistics.median(t / b for t, b in zip(row["seconds"], baseline, strict=True))
            quality_of = found["psnr"], found["psnr_worst_tenth"]
            if not all(map(is_finite_number, quality_of)):
                raise ValueError(f"PSNR {quality_of}")
            points.append(Point(row["config"], name, share, *quality_of))
    panels = {scale: points for scale, points in panels.items() if any(p.config.startswith("fast") for p in points)}
    if not panels:
        raise UserError("--quality and --times have no guidance scale of --fast in common")
    return panels


def plot(panels: dict[str, list[Point]], title: str, path: Path) -> None:
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for scale, points in panels.items():
        for point in points:
            line = lines.setdefault(scale, {}).setdefault(LABELS.get(point.config, point.config), [])
            line.append((point.time, point.psnr))
    plot_panels(lines, "time of the denoising loop (all steps: 1)", title, path)


def run(args: argparse.Namespace) -> None:
    make_output_dir(args.output.parent)
    for flag, path in (("--quality", args.quality), ("--times", args.times)):
        if not path.is_file():
            raise UserError(f"{flag} {path}: there is no such file")
    quality, times = read_json(args.quality), read_json(args.times)
    try:
        panels = join(quality, times)
        title = "{steps} steps, {device}, {dtype}".format(**times["settings"])
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{args.quality} must be compare.py's and {args.times} benchmark.py's, of this version: {error!r}"
        ) from error
    for scale, points in panels.items():
        print(f"guidance {scale}")
        rows = [
            (f"{p.name} ({p.config})", [p.time, p.psnr, p.psnr_worst_tenth], ".3f")
            for p in sorted(points, key=lambda p: p.time)
        ]
        print(format_table(["time", "PSNR", "worst tenth"], rows))
    plot(panels, title, args.output)
    print(f"The picture is {args.output}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
