"""How much faster two devices denoise than one: the UNet of SD2.1-base with random weights, guidance shared.

    python scripts/benchmark_parallel.py                    two processes of one thread each, on the CPU
    python scripts/benchmark_parallel.py --pixels 256 --rounds 5

One device and two draw in turns, each time in fresh processes; the speed-up is a ratio of neighbours, and its median
over the rounds is reported. Only the denoising loop is timed, after a first step that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import PROMPT_TOKENS, make_pipeline

from ascend.device import DeviceManager
from ascend.parallel import choose_branch_size, process_group, share_guidance, world_size
from examples.common.cli import ArgumentParser, image_size, one_line_errors, positive_int
from examples.common.launch import launch


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark_parallel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="NAME", help="npu, cuda or cpu (cpu)")
    add("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    add("--steps", type=positive_int, default=2, metavar="N", help="timed denoising steps (2)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    add("--output", type=Path, help=argparse.SUPPRESS)  # of a rank: where its time goes
    return parser.parse_args(arguments)


def denoise(args: argparse.Namespace) -> None:
    """What each rank does; rank 0 writes the seconds of the timed steps and the sum of the latents."""
    name = args.device if args.device == "cpu" else f"{args.device}:{os.environ.get('LOCAL_RANK', 0)}"
    manager = DeviceManager(name)
    pipe = make_pipeline(argparse.Namespace(model="sd2.1-base", seed=0), manager, manager.dtype)
    seconds = [0.0]

    def on_step_end(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, args.steps):
            manager.synchronize()
            seconds.append(time.perf_counter())
        return tensors

    width = pipe.unet.config.cross_attention_dim
    prompt = torch.randn(2, 1, PROMPT_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(pipe.unet.device)
    with process_group(manager.device, choose_branch_size(world_size(), has_guidance=True)) as mesh:
        share_guidance(pipe, mesh)
        latents = pipe(
            prompt_embeds=prompt[0].to(pipe.unet.dtype),
            negative_prompt_embeds=prompt[1].to(pipe.unet.dtype),
            height=args.pixels,
            width=args.pixels,
            num_inference_steps=args.steps + 1,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).images
        if mesh.rank == 0:
            args.output.write_text(json.dumps({"seconds": seconds[-1] - seconds[-2], "latents": latents.tolist()}))


def run(args: argparse.Namespace) -> None:
    if args.output:
        denoise(args)
        return
    results: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for devices, found in results.items():
                output = Path(folder, "result.json")
                options = ["--device", args.device, "--pixels", str(args.pixels), "--steps", str(args.steps)]
                launch([*range(devices)], Path(folder), [__file__, *options, "--output", str(output)])
                found.append(json.loads(output.read_text()))
    one, two = ([result["seconds"] for result in found] for found in results.values())
    first, second = (torch.tensor(found[-1]["latents"]) for found in results.values())
    steps = [statistics.median(seconds) / args.steps for seconds in (one, two)]
    print(f"seconds a step: {steps[0]:.2f} on one device, {steps[1]:.2f} on two")
    print(f"speed-up of two devices: {statistics.median(a / b for a, b in zip(one, two, strict=True)):.2f}x")
    print(f"latents differ by {((first - second).norm() / first.norm()).item():.1e} of their norm")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
