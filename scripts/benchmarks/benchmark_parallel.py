"""How much faster two devices draw a picture than one: SD2.1-base with random weights, guidance shared.

    python scripts/benchmarks/benchmark_parallel.py                    two processes of one thread each, on the CPU
    python scripts/benchmarks/benchmark_parallel.py --flags FA TOME DC --interval 2
    python scripts/benchmarks/benchmark_parallel.py --flags FA "fast balanced" dynamo --steps 50 --guidance_scale 4

One device and two denoise in turns: while the first computes alone, the second waits. The speed-up is a ratio of
neighbours, and its median over the rounds is reported. Each round ends with a branch of the guidance on each device
and no exchange, which is the most that the machine can give, as its cores share memory and clock. Then it times, on
one device, the text encoder, the VAE's decoder, and the decoder on half a picture, as tiles would give to each device.
From these it computes whole pictures, and what more devices would bring, which it marks as simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.graphs.compile import compile_pipeline
from ascend.memory import keep_freed_memory
from ascend.parallel import Mesh, process_group, share_guidance, unshare_guidance
from ascend.parallel.mesh import wait_for_all
from runners.cache_options import FAST
from runners.cli import ArgumentParser, file_path, finite_float, image_size, one_line_errors, positive_int
from runners.devices import DTYPES, choose_dtype
from runners.launch import result_of_ranks
from runners.report import Report, format_table
from runners.stable_diffusion.arguments import merge_ratio
from runners.unet_cost import PROMPT_TOKENS
from scripts.benchmarks.benchmark import (
    call_options,
    denoise,
    make_pipeline,
    sd21_scheduler,
    steps_of,
    switched_on,
    warm_up_options,
)

FLAGS = ("FA", "TOME", "DC", "dynamo", *(f"fast {row}" for row in FAST))
SD21_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
SD21_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TILE_OVERLAP = 0.25  # of a tile, diffusers' own
PICTURE_STEPS = 50  # of the whole picture that the table speaks of
PROMPTS = 960  # of the batch in the table: as many for each of 2 to 16 devices
DEVICES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Times:
    """Seconds of a denoising step of each round, and of the rest on one device.

    A step on `one` device, on `two`, and of one branch on each of two that exchange nothing (`apart`).
    """

    one: list[float]
    two: list[float]
    apart: list[float]
    text: float
    decoder: float
    tile: float

    def picture(self, steps: list[float]) -> float:
        return self.text + PICTURE_STEPS * statistics.median(steps) + self.decoder


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark_parallel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="NAME", help="npu, cuda or cpu (cpu)")
    add("--dtype", choices=DTYPES, help="(the device's best)")
    add("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    add("--flags", nargs="*", choices=FLAGS, default=[], metavar="FLAG", help=f"accelerations of {' '.join(FLAGS)}")
    add("--interval", type=positive_int, default=2, metavar="N", help="of full steps with DC (2)")
    add("--ratio", type=merge_ratio, default=0.5, metavar="R", help="of merged tokens with TOME (0.5)")
    add("--steps", type=positive_int, default=2, metavar="N", help="denoising steps of a turn (2)")
    add("--guidance_scale", type=finite_float, default=7.5, metavar="G", help="by which fast chooses its steps (7.5)")
    add("--schedule", type=file_path, metavar="FILE", help="of the steps of fast, as run_sd.py takes it")
    add("--rounds", type=positive_int, default=5, metavar="N", help="(5)")
    add("--output", type=Path, help=argparse.SUPPRESS)  # of a rank: where its seconds go
    parser.set_defaults(model="sd2.1-base", seed=0)
    args = parser.parse_args(arguments)
    args.height = args.width = args.pixels
    caches = [flag for flag in args.flags if flag == "DC" or flag.startswith("fast")]
    if len(caches) > 1:
        parser.error(
            f"--flags {' '.join(map(repr, caches))}: each says which steps are full ones, so take one of them"
        )
    if args.schedule and not any(flag.startswith("fast") for flag in caches):
        parser.error(f"--schedule {args.schedule} has no effect without fast in --flags")
    if "DC" in args.flags and args.steps % args.interval:
        parser.error(f"--steps {args.steps} must be a multiple of --interval {args.interval}, to time whole intervals")
    return args


def measure(args: argparse.Namespace) -> None:
    """What each rank does; rank 0 writes the times and how far the latents differ to `args.output`."""
    name = args.device if args.device == "cpu" else f"{args.device}:{os.environ['LOCAL_RANK']}"
    manager = DeviceManager(name)
    dtype = choose_dtype(args, manager, Report())
    keep_freed_memory()
    pipe = make_pipeline(args, manager, dtype)
    seconds: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    one_branch = argparse.Namespace(**vars(args) | {"guidance_scale": 1.0})
    turn = call_options(pipe.scheduler, args.flags, args)
    with process_group(manager.device, branch_size=2) as mesh, switched_on(pipe, args.flags, args):
        if "dynamo" in args.flags:
            compile_pipeline(pipe)
        for number in tqdm(range(args.rounds + 1), desc="rounds, the first to warm up", disable=mesh.rank > 0):
            options = turn if number else warm_up_options(turn)
            if mesh.rank == 0:
                alone, expected = denoise(pipe, args, manager, options)
            wait_for_all(mesh, manager.device)
            manager.synchronize()
            with sharing(pipe, mesh):
                together, latents = denoise(pipe, args, manager, options)
            wait_for_all(mesh, manager.device)
            apart, _ = denoise(pipe, one_branch, manager, options)
            if number and mesh.rank == 0:
                for name, taken in (("one", alone), ("two", together), ("apart", apart)):
                    seconds[name].append(taken / args.steps)
        if mesh.rank == 0:
            times = Times(seconds["one"], seconds["two"], seconds["apart"], **time_ends(args, manager, dtype))
            difference = ((latents - expected).float().norm() / expected.float().norm()).item()
            args.output.write_text(json.dumps({"times": asdict(times), "difference": difference}))
        wait_for_all(mesh, manager.device)


@contextmanager
def sharing(pipe: StableDiffusionPipeline, mesh: Mesh) -> Iterator[None]:
    share_guidance(pipe, mesh)
    yield
    unshare_guidance(pipe)


@torch.no_grad()
def time_ends(args: argparse.Namespace, manager: DeviceManager, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the text encoder for prompt and negative prompt, and of the decoder, in SD2.1's true size."""
    text_encoder = CLIPTextModel(CLIPTextConfig(**SD21_TEXT)).to(manager.device, dtype)
    tokens = torch.zeros(2, PROMPT_TOKENS, dtype=torch.long, device=manager.device)
    vae = AutoencoderKL(**SD21_VAE).to(manager.device, dtype)
    rows = args.pixels // 8
    text_encoder(tokens)  # the first call waits for memory
    half = round(rows / (2 - TILE_OVERLAP))  # two of them, overlapping by a share of their own
    picture = torch.zeros(1, 4, rows, rows, device=manager.device, dtype=dtype)
    return {
        "text": seconds_of(manager, lambda: text_encoder(tokens)),
        "decoder": seconds_of(manager, lambda: vae.decode(picture)),
        "tile": seconds_of(manager, lambda: vae.decode(picture[:, :, :half])),
    }


def seconds_of(manager: DeviceManager, call: Callable[[], object]) -> float:
    manager.synchronize()
    start = time.perf_counter()
    call()
    manager.synchronize()
    return time.perf_counter() - start


def scaling_table(times: Times) -> str:
    """Seconds of one picture and pictures in an hour: measured for up to two devices, computed for more.

    Devices draw pictures independently of each other, alone or in pairs, so that only the last, incomplete turn costs.
    """
    one, two = times.picture(times.one), times.picture(times.two)
    rows = []
    for devices in DEVICES:
        fastest = two if devices > 1 else one
        turns = -(-PROMPTS // max(devices // 2, 1))
        hourly = [3600 * PROMPTS / (turns * fastest), 3600 * PROMPTS / (-(-PROMPTS // devices) * one)]
        label = f"{devices} devices, simulated" if devices > 2 else f"{devices}, measured"
        rows.append((label, [fastest, *hourly], ".4g"))
    headings = ["a picture (s)", "an hour, in pairs", "an hour, each alone"]
    return f"{format_table(headings, rows)}\n(each alone: simulated from one device)"


def speed_up(alone: list[float], together: list[float]) -> str:
    ratios = [one / two for one, two in zip(alone, together, strict=True)]
    return f"{statistics.median(ratios):.2f}x (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    if args.output:
        measure(args)
        return
    scheduler = sd21_scheduler()
    steps_of(scheduler, args.flags, args, call_options(scheduler, args.flags, args))  # fails before any rank is there
    result = result_of_ranks([0, 1], [__file__, *arguments])
    times = Times(**result["times"])
    one, two = times.picture(times.one), times.picture(times.two)
    table: list[tuple[str, list[float | None], str]] = [
        ("denoising step", [statistics.median(times.one), statistics.median(times.two)], ".3f"),
        ("text encoder", [times.text, None], ".3f"),
        ("decoder", [times.decoder, None], ".3f"),
        ("decoder, half a picture", [times.tile, None], ".3f"),
        (f"picture of {PICTURE_STEPS} steps", [one, two], ".1f"),
    ]
    print(format_table(["one device (s)", "two devices (s)"], table))
    print(f"speed-up of denoising on two devices: {speed_up(times.one, times.two)}")
    print(f"of two that compute a branch each and exchange nothing, at most: {speed_up(times.one, times.apart)}")
    print(f"of a picture of {PICTURE_STEPS} steps: {one / two:.2f}x")
    print(f"latents differ by {result['difference']:.1e} of their norm\n")
    print(scaling_table(times))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments), sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
