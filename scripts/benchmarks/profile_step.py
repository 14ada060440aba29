"""How near a whole denoising step comes to the machine's speed at matrix products, and what takes the rest.

    python scripts/benchmarks/profile_step.py                              the true configuration of SD2.1-base
    python scripts/benchmarks/profile_step.py --dtype bfloat16 --flags FA dynamo

In turns with a product of two matrices of 4096 x 4096, a picture is denoised for a few steps with guidance, and the
arithmetic of its UNet (products, convolutions and attention, as step_flops counts it) is divided by the time of a step
with its scheduler. A last picture is drawn under torch's profiler, whose own cost is in the times of the operators.
Writes profile.json to --output_dir.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.graphs.compile import compile_pipeline
from processors import enable_flash_attention
from runners.cli import ArgumentParser, UserError, file_path, one_line_errors, positive_int
from runners.devices import add_device_arguments, check_compiler, choose_device, choose_dtype
from runners.files import make_output_dir
from runners.model_dir import require_patched_diffusers
from runners.report import Report, format_table
from runners.unet_cost import GIGA, step_flops
from scripts.benchmarks.benchmark import make_pipeline, random_prompts

FLAGS = ("FA", "dynamo")
PRODUCT = 4096  # rows and columns
BRANCHES = 2  # of guidance
SHOWN = 20  # operators, of which a table is read


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="profile_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="sd2.1-base", metavar="NAME", help="or a pipeline's directory (sd2.1-base)")
    add("--flags", nargs="*", choices=FLAGS, default=list(FLAGS), metavar="FLAG", help=f"({' '.join(FLAGS)})")
    add("--steps", type=positive_int, default=4, metavar="N", help="of each picture, the first not counted (4)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and latents (0)")
    add_device_arguments(parser)
    add("--output_dir", type=file_path, default=Path("outputs/profile"), metavar="DIR", help="(outputs/profile)")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error("--steps 1: the first step is not counted, so take 2 or more")
    return args


def product_speed(manager: DeviceManager, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    left, right = torch.randn(2, PRODUCT, PRODUCT, device=manager.device).to(dtype)
    times = []
    for _ in range(4):  # the first packs and fills caches
        manager.synchronize()
        start = time.perf_counter()
        left @ right
        manager.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / statistics.median(times[1:])


def step_times(pipe: Any, args: argparse.Namespace, manager: DeviceManager) -> list[float]:
    """Seconds of each step of a picture but the first."""
    generator = torch.Generator().manual_seed(args.seed)
    prompt, negative = random_prompts(pipe, generator)
    ends = []

    def note(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        manager.synchronize()
        ends.append(time.perf_counter())
        return tensors

    pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=args.steps,
        generator=generator,
        output_type="latent",
        callback_on_step_end=note,
    )
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def operators(pipe: Any, args: argparse.Namespace, manager: DeviceManager) -> dict[str, dict[str, float]]:
    """By operator its calls a step, and its share of the time of all."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if manager.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step_times(pipe, args, manager)
    kind = "self_device_time_total" if manager.device.type == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    total = sum(getattr(event, kind) for event in events)
    events.sort(key=lambda event: getattr(event, kind), reverse=True)
    return {
        event.key: {"calls": event.count / args.steps, "share": getattr(event, kind) / total}
        for event in events
        if getattr(event, kind)
    }


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    if manager.device.type == "npu":
        raise UserError("--device npu: scripts/benchmarks/count_step.py counts what a step is made of there")
    dtype = choose_dtype(args, manager, report)
    pipe = make_pipeline(args, manager, dtype)
    if "FA" in args.flags:
        enable_flash_attention(pipe)
    if "dynamo" in args.flags:
        check_compiler(manager.device)
        compile_pipeline(pipe)
    size = pipe.unet.config.sample_size
    work = BRANCHES * step_flops(pipe.unet.config, size, size).full
    with torch.no_grad():
        step_times(pipe, args, manager)  # compiles
        speeds, shares, seconds = [], [], []
        for _ in range(args.rounds):
            speeds.append(product_speed(manager, dtype))
            seconds.append(statistics.median(step_times(pipe, args, manager)))
            shares.append(work / seconds[-1] / speeds[-1])
        found = operators(pipe, args, manager)
    summary = {
        "gflops_of_a_step": work / GIGA,
        "seconds_of_a_step": statistics.median(seconds),
        "gflops_per_second_of_a_step": work / GIGA / statistics.median(seconds),
        "gflops_per_second_of_a_product": statistics.median(speeds) / GIGA,
        "share": statistics.median(shares),
    }
    print(format_table(["value"], [(name, [value], ".2f") for name, value in summary.items()]))
    rows = [(name[:60], [row["calls"], 100 * row["share"]], ".1f") for name, row in list(found.items())[:SHOWN]]
    print(format_table(["calls a step", "% of the time"], rows))
    report.sections = {
        "settings": {**vars(args), "device": str(manager.device), "dtype": str(dtype)},
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "summary": summary,
        "operators": found,
    }
    report.write(output_dir / "profile.json")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
