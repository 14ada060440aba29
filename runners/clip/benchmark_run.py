"""The command line of benchmark.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.cli import ArgumentParser, UserError, file_path, non_negative_int, one_line_errors, positive_int, text
from runners.clip.arguments import MODEL, TEXTS
from runners.clip.benchmark import PerformanceBenchmark, comparison_table, merge
from runners.clip.inputs import open_rgb
from runners.files import make_output_dir, write_json
from runners.images import save_figure

DEVICES = ("npu", "cuda", "cpu")


def parse_arguments(program: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=text, default=MODEL, metavar="DIR", help=f"a folder, or a name on the hub ({MODEL})")
    add("--image", type=file_path, metavar="FILE", help="the picture")
    add("--texts", type=text, nargs="+", default=TEXTS, metavar="TEXT", help="(a cat, a dog)")
    add("--devices", nargs="+", choices=DEVICES, metavar="NAME", help=f"of {', '.join(DEVICES)} (all there are)")
    add("--num-runs", type=positive_int, default=100, metavar="N", help="timed calls; a p99 wants 500 (100)")
    add("--warmup-runs", type=non_negative_int, default=10, metavar="N", help="calls before them (10)")
    add("--no-fp16", action="store_true", help="no float16 on NPU and CUDA")
    add("--bf16", action="store_true", help="bfloat16 where the device computes in it, too")
    add("--exported", type=text, metavar="DIR", help="by onnxruntime and as offline models, too: of convert_to_om.py")
    add("--batch-sizes", type=positive_int, nargs="+", default=[], metavar="N", help="throughput at these, too")
    add("--output", type=file_path, default=Path("benchmark_results.json"), metavar="FILE", help="(%(default)s)")
    add("--plot", type=file_path, metavar="FILE", help="a .png of latency and throughput; needs matplotlib")
    add("--merge", type=file_path, nargs="+", metavar="FILE", help="measure nothing: put results of others together")
    args = parser.parse_args(arguments)
    if not args.merge and not args.image:
        raise UserError("--image says which picture to measure with")
    if args.image:
        open_rgb(args.image)  # before anything is measured
    if any(not each.strip() for each in args.texts):
        raise UserError("--texts has an empty text")
    return args


def run(args: argparse.Namespace) -> None:
    make_output_dir(args.output.parent)
    if args.merge:
        results = merge(args.merge)
        write_json(args.output, results)
        print(comparison_table(results))
    else:
        benchmark = PerformanceBenchmark(args.model, args.exported)
        results = benchmark.run_comparison(
            args.image,
            args.texts,
            args.devices,
            args.num_runs,
            test_fp16=not args.no_fp16,
            warmup_runs=args.warmup_runs,
            batch_sizes=args.batch_sizes,
            test_bf16=args.bf16,
        )
        benchmark.save_results(args.output)
        benchmark.print_comparison_table()
    print(f"results are in {args.output}")
    if args.plot:
        plot(results, args.plot)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Latency of each configuration, and throughput of the image tower over its batch sizes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("warning: there is no plot: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(results)
    middles = [results[name]["p50_ms"] for name in names]
    spans = [results[name]["p95_ms"] - results[name]["p50_ms"] for name in names]
    left.barh(names, middles, xerr=[[0] * len(names), spans])
    left.set(xlabel="ms of a picture, median and p95", xlim=(0, None))
    for name in names:
        batches = results[name]["batches"]
        right.plot([*map(int, batches)], [each["throughput_per_sec"] for each in batches.values()], "o-", label=name)
    right.set(xlabel="pictures in a batch", ylabel="pictures a second", ylim=(0, None))
    right.legend()
    save_figure(figure, path)


def main(program: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `program`, which `description` describes."""
    with one_line_errors():
        run(parse_arguments(program, description, arguments))
