"""Measure HiDream-E1's transformer blocks of true width, upstream's code against ours, and estimate whole steps.

    python scripts/benchmarks/hidream_blocks.py                          on the best device: seconds, alternating
    python -m emulator run --soc Ascend310P3 --trace outputs/hidream_blocks/trace.jsonl -- \\
        python scripts/benchmarks/hidream_blocks.py --device npu     launches, waits, bytes, an estimate of time

One block of each kind has random weights; a step of the true depth, 16 and 32 blocks, is estimated from them by the
arithmetic of its tokens. Upstream pads what is not square to `max_seq` tokens, ours computes one for all padding.
On the emulator the seconds are those of the chip's nominal speed and bandwidth: no measurement.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import HiDreamImageTransformer2DModel
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend import compile_module
from ascend.memory import keep_freed_memory
from emulator import profile
from processors import enable_fused_kernels
from runners.cli import ArgumentParser, UserError, file_path, one_line_errors, positive_int
from runners.devices import DTYPES, choose_device, choose_dtype
from runners.files import make_output_dir, write_json
from runners.report import Report, format_table
from scripts.benchmarks.count_step import count

DIM, HEADS, HEAD_DIM, TEXT_TOKENS = 2560, 20, 128, 384
EXPERT_DIM, SHARED_DIM, CHOICES = 6912, 3584, 2
DEPTHS = {"double": 16, "single": 32}
COUNTED = ("launches", "waits", "GFLOP", "GB moved", "estimated ms")


class Step(NamedTuple):
    """A kind of step: tokens of a branch with upstream's padding and with ours, and how many branches there are."""

    name: str
    padded: int
    tokens: int
    branches: int


# Sizes and padding of docs and scripts of HiDream-ai/HiDream-E1: E1-Full at 768 x 768, E1.1 at 1360 x 768
STEPS = (
    Step("E1-Full, 768 x 768, edit", 4608, 4608, 3),
    Step("E1-Full, 768 x 768, refine", 2304, 2304, 2),
    Step("E1.1, 1360 x 768, edit", 8192, 8161, 3),
    Step("E1.1, 1360 x 768, refine", 8192, 4081, 2),
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hidream_blocks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=positive_int, default=4608, metavar="N", help="of the picture and its source (4608)")
    add("--batch", type=positive_int, default=1, metavar="N", help="branches in a call (1)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="of both in turn; the median counts (3)")
    add("--dynamo", action="store_true", help="ours as graphs")
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--dtype", choices=DTYPES, help="(the device's best)")
    add("--output_dir", type=file_path, default=Path("outputs/hidream_blocks"), metavar="DIR", help="(%(default)s)")
    parser.set_defaults(local_rank=None, soc_version=None)
    return parser.parse_args(arguments)


def make_transformer(dtype: torch.dtype, device: torch.device) -> HiDreamImageTransformer2DModel:
    """One block of each kind, in the model's own sizes."""
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            caption_channels=[4096, 4096],
            axes_dims_rope=(64, 32, 32),
            max_resolution=(96, 192),
            llama_layers=[0, 0],
            force_inference_output=True,
        )
    model.caption_projection = nn.ModuleList()  # a step has them once a picture
    model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def calls_of(model: HiDreamImageTransformer2DModel, tokens: int, batch: int) -> dict[str, Callable[[], Any]]:
    """A call of each kind of block."""
    parameter = next(model.parameters())
    options = {"dtype": parameter.dtype, "device": parameter.device}
    image, text = torch.randn(batch, tokens, DIM, **options), torch.randn(batch, TEXT_TOKENS, DIM, **options)
    both, temb = torch.cat([image, text], dim=1), torch.randn(batch, DIM, **options)
    ids = torch.zeros(1, tokens + TEXT_TOKENS, 3, device=parameter.device)
    ids[:, :tokens, 1] = torch.arange(tokens, device=parameter.device) // 96
    ids[:, :tokens, 2] = torch.arange(tokens, device=parameter.device) % 96
    shared = {"temb": temb, "image_rotary_emb": model.pe_embedder(ids)}
    double, single = model.double_stream_blocks[0], model.single_stream_blocks[0]
    return {
        "double": lambda: double(hidden_states=image, encoder_hidden_states=text, **shared),
        "single": lambda: single(hidden_states=both, encoder_hidden_states=None, **shared),
    }


def flops_of(kind: str, tokens: int) -> float:
    """Products of a block for one branch: of the experts that a token goes to, and attention over all."""
    total = tokens + TEXT_TOKENS
    expert = 2 * 3 * DIM * EXPERT_DIM
    mixture = CHOICES * expert + 2 * 3 * DIM * SHARED_DIM
    projections = 2 * 4 * DIM * DIM
    feed_forward = tokens * mixture + TEXT_TOKENS * expert if kind == "double" else total * mixture
    return total * projections + 4 * total * total * DIM + feed_forward


def measure(codes: dict[str, dict[str, Callable[[], Any]]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of each code and kind of block, each the median of `rounds` in turn."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    seconds: dict[str, dict[str, list[float]]] = {code: {kind: [] for kind in DEPTHS} for code in codes}
    for number in range(rounds + 1):
        for kind in DEPTHS:
            for code, calls in codes.items():
                if module:
                    module.synchronize()
                start = time.perf_counter()
                calls[kind]()
                if module:
                    module.synchronize()
                if number:  # the first is to warm up
                    seconds[code][kind].append(time.perf_counter() - start)
    return {code: {kind: statistics.median(all_) for kind, all_ in kinds.items()} for code, kinds in seconds.items()}


def count_launches(codes: dict[str, dict[str, Callable[[], Any]]], trace: Path, soc: str) -> dict[str, Any]:
    """What the emulated chip has to do for each code and kind of block."""
    torch.get_device_module("npu").set_task_queue_enable(0)  # so that the trace has a launch as soon as it is made
    chip = profile.load(soc)
    found: dict[str, Any] = {}
    for code, calls in codes.items():
        found[code] = {}
        for kind, call in calls.items():
            if code.endswith("graphs"):
                call()  # compiles
            start = trace.stat().st_size
            call()
            found[code][kind] = {name: count(trace, start, trace.stat().st_size, chip)[name] for name in COUNTED}
    return found


def steps_of(seconds: dict[str, Any], measured: int) -> dict[str, dict[str, float]]:
    """Seconds of whole steps, from those of blocks of `measured` tokens of one branch."""
    steps: dict[str, dict[str, float]] = {}
    for step in STEPS:
        steps[step.name] = {}
        for code, blocks in seconds.items():
            tokens = step.padded if code == "upstream" else step.tokens
            steps[step.name][code] = step.branches * sum(
                depth * blocks[kind] * flops_of(kind, tokens) / flops_of(kind, measured)
                for kind, depth in DEPTHS.items()
            )
    return steps


def report_seconds(seconds: dict[str, Any], measured: int) -> dict[str, Any]:
    """Print blocks and steps, and the ratio of each code to upstream's."""
    codes = list(seconds)
    rows = [(f"a {kind} block", [seconds[code][kind] for code in codes], ".4g") for kind in DEPTHS]
    steps = steps_of(seconds, measured)
    rows += [(f"{name} *", [step[code] for code in codes], ".4g") for name, step in steps.items()]
    table = [(name, [*values, values[0] / values[-1]], kind) for name, values, kind in rows]
    print(format_table([*(f"{code}, s" for code in codes), "ratio"], table))
    print("* estimated, 16 and 32 blocks")
    return {"blocks": seconds, "steps": steps}


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    output_dir, report = make_output_dir(args.output_dir), Report()
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    if manager.device.type == "cpu":
        keep_freed_memory()
    upstream = make_transformer(dtype, manager.device)
    ours = copy.deepcopy(upstream)
    enable_fused_kernels(ours)
    codes = {"upstream": calls_of(upstream, args.tokens, args.batch), "ours": calls_of(ours, args.tokens, args.batch)}
    if args.dynamo:
        graphs = copy.deepcopy(ours)
        for block in (graphs.double_stream_blocks[0], graphs.single_stream_blocks[0]):
            compile_module(block, output_dir / "graphs")
        codes["ours, graphs"] = calls_of(graphs, args.tokens, args.batch)
    trace, soc = os.environ.get("CANN_EMULATOR_TRACE"), os.environ.get("CANN_EMULATOR_SOC")
    about = {"tokens": args.tokens, "batch": args.batch, "dtype": str(dtype), "device": str(manager.device)}
    if manager.device.type == "npu" and soc:
        if not trace:
            raise UserError("the emulator counts in a trace: python -m emulator run --trace FILE -- ...")
        counts = count_launches(codes, Path(trace), soc)
        rows = [(f"{kind}, {code}", list(counts[code][kind].values()), ",.4g") for kind in DEPTHS for code in codes]
        print(format_table(list(COUNTED), rows))
        seconds = {
            code: {k: c["estimated ms"] / 1e3 / args.batch for k, c in of.items()} for code, of in counts.items()
        }
        about["counts"] = counts
    else:
        measured = measure(codes, manager.device, args.rounds)
        seconds = {code: {kind: s / args.batch for kind, s in of.items()} for code, of in measured.items()}
    write_json(output_dir / "blocks.json", about | report_seconds(seconds, args.tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
